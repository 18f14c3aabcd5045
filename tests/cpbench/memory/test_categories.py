"""From allocations to the numbers of a record."""

from __future__ import annotations

import pytest

from cpbench.memory.categories import analyse, category
from cpbench.memory.timeline import Allocation, Event, Timeline


class Script:
    """Writes a timeline by hand."""

    def __init__(self) -> None:
        self.timeline = Timeline()

    def allocate(
        self, size: int, *scope: str, label: str | None = None, site: str = "", kernel: bool = False
    ) -> Allocation:
        a = Allocation(bytes=size, scope=scope, site=site, inside_kernel=kernel, label=label)
        self.timeline.events.append(Event(a, False, scope))
        return a

    def free(self, a: Allocation, *scope: str) -> None:
        self.timeline.events.append(Event(a, True, scope))


def test_peak_counts_what_was_alive_before_the_step() -> None:
    """Parameters made before the step are part of its peak; an earlier, higher peak is not."""
    script = Script()
    script.allocate(100, label="sharded_parameters")
    script.free(script.allocate(1000, "step:0", "forward"))
    temporary = script.allocate(50, "step:1", "forward", "mlp")
    script.free(temporary, "step:1", "forward", "mlp")

    numbers = analyse(script.timeline, step="step:1")

    assert numbers.peak_bytes == 150
    assert numbers.by_category == {"sharded_parameters": 100, "mlp": 50}
    assert numbers.by_phase == {"forward": 150}


def test_categories_add_up_to_the_peak() -> None:
    """Whatever was alive at the peak is in exactly one category."""
    script = Script()
    for size, scope in ((7, "mlp"), (11, "norm"), (13, "attention:0"), (17, "loss"), (19, "nowhere")):
        script.allocate(size, "step:1", "backward", scope)
    script.allocate(23, "step:1", "backward", site="FSDP::all_gather_copy_out (blocks.1)")

    numbers = analyse(script.timeline, step="step:1")

    assert sum(numbers.by_category.values()) == numbers.peak_bytes == 90
    assert numbers.by_category["attention"] == 13
    assert numbers.by_category["other"] == 19
    assert numbers.by_category["unsharded_parameters"] == 23


def test_host_memory_is_left_out() -> None:
    """A slab of the offload pool lives in the same allocator on CPU, but is no device memory."""
    script = Script()
    slab = script.allocate(1000, "step:1", "forward", "offload", label="host")
    script.allocate(10, "step:1", "forward", "mlp")
    script.free(slab, "step:1")

    assert analyse(script.timeline, step="step:1").peak_bytes == 10


def test_attention_intermediates_are_those_of_one_block_without_its_output() -> None:
    """Output and gradients a block returns do not count; what two blocks keep is not added up."""
    script = Script()
    for layer in (0, 1):
        scope = ("step:1", "forward", f"attention:{layer}")
        script.allocate(100, *scope)
        script.allocate(40, *scope, label="attention_output")
        script.free(script.allocate(30, *scope, kernel=True), *scope)
    backward = ("step:1", "backward", "attention:1")
    script.allocate(60, *backward)
    script.allocate(500, *backward, label="weight_gradient")
    script.allocate(40, *backward, label="attention_input_gradient")

    numbers = analyse(script.timeline, step="step:1")

    assert numbers.attention_forward_peak == 130
    assert numbers.attention_backward_peak == 160
    assert numbers.attention_peak == 160


@pytest.mark.parametrize(
    ("allocation", "expected"),
    [
        (Allocation(1, ("step:1", "forward", "attention:2"), ""), "attention"),
        (Allocation(1, ("step:1", "forward", "attention:2", "communication"), ""), "communication_buffers"),
        (Allocation(1, ("attention:2",), "", inside_kernel=True), "kernel_scratch"),
        (Allocation(1, ("attention:2",), "", label="weight_gradient"), "gradients"),
        (
            Allocation(1, ("backward",), "FSDP::post_backward_reduce (blocks.1) > aten::empty"),
            "communication_buffers",
        ),
        (Allocation(1, ("backward",), "", label="host"), None),
        (Allocation(1, (), ""), "other"),
    ],
)
def test_an_allocation_has_one_category(allocation: Allocation, expected: str | None) -> None:
    """Marks come first, then kernels and FSDP, then the innermost scope that means something."""
    assert expected == category(allocation)
