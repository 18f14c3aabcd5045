"""The step over all layers, put together from a few, held against the step that runs all of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cpbench import optimizer, registry
from cpbench.case import STACKS, Case
from cpbench.memory.timeline import Allocation, Event
from cpbench.model_config import ModelConfig
from cpbench.resolve import resolve
from cpbench.timing.operation import Operation
from cpbench.world.estimate import estimate_case, traced_step
from cpbench.world.layers import Depth, NotPeriodic, Trace, host_peak_bytes, repeated

LAYERS = 6


def case(method: str, stack: str, device: str, *, layers: int = LAYERS, **stack_fields: object) -> Case:
    model = ModelConfig(
        hidden_dim=64, num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=101
    )
    requested = Case.model_validate(
        {
            "method": method,
            "model": "deep",
            "architecture": model,
            "seq_len": 8192,
            "world_size": 1 if method == "single" else 2,
            "stack": STACKS[stack].model_copy(update=stack_fields),
            "mode": "estimate",
            "device": device,
            "dtype": "bfloat16" if device == "cuda" else "float32",
        }
    )
    resolved, unsupported = resolve(requested, [])
    if unsupported is not None:
        pytest.skip(unsupported)
    return resolved


def spelled(trace: Trace) -> list[object]:
    """Everything that a step did, in order, by value."""
    return [
        (
            *(item.name, item.work, item.stream, item.flops, item.size, item.shape, item.times, item.scope),
            [wait.name for wait in item.waits],
        )
        if isinstance(item, Operation)
        else (item.is_free, item.allocation.bytes, item.allocation.site, item.allocation.scope, item.scope)
        for item in trace.items()
        if "step:1" in item.scope
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stack", "device"),
    [
        *((method, stack, "cuda") for method in sorted(registry.method_files()) for stack in STACKS),
        *((method, "long", "cpu") for method in ("fpdt", "offload", "upipe")),  # they use host memory most
    ],
)
def test_repeated_layers_do_what_all_layers_do(method: str, stack: str, device: str) -> None:
    """Every allocation, free and operation of the whole step is there, in order, and so is every number."""
    c = case(method, stack, device)
    loaded = registry.load(c.method, c.options)
    few, every = traced_step(c, loaded), traced_step(c, loaded, edges=())

    assert few.layers < every.layers == LAYERS
    assert spelled(few.trace) == spelled(every.trace)
    assert host_peak_bytes(few.trace.events) == host_peak_bytes(every.trace.events)


@pytest.mark.slow
@pytest.mark.parametrize("piece", [777, 5000, 10**6])
def test_streamed_optimizer_states_are_repeated(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces a layer or one, small beside a layer or large: the same copies, in order, as with all layers."""
    monkeypatch.setattr(optimizer, "PIECE", piece)
    c = case("ulysses", "checkpoint", "cuda", optimizer_offload=True)
    loaded = registry.load(c.method, c.options)
    few, every = traced_step(c, loaded), traced_step(c, loaded, edges=())

    assert few.layers < every.layers == LAYERS
    assert spelled(few.trace) == spelled(every.trace)
    copies = [
        item.stream for item in few.trace.items() if isinstance(item, Operation) and item.work == "copy"
    ]
    assert copies.count("copy_in") == copies.count("copy_out") >= LAYERS + 2
    assert host_peak_bytes(few.trace.events) == host_peak_bytes(every.trace.events)
    assert host_peak_bytes(few.trace.events) >= 8 * c.architecture.num_params // c.world_size


@pytest.mark.slow
def test_host_memory_of_repeated_layers_is_counted() -> None:
    """Offloaded inputs take one tensor a layer, however few layers ran."""
    c = case("ulysses", "long", "cuda", layers=20)
    memory = estimate_case(c, registry.load(c.method, c.options)).ranks[0].memory

    assert memory.host_pinned_peak_bytes == 20 * c.tokens_per_rank * 64 * 2


def test_templates_of_layers() -> None:
    """Edges stand for themselves and the first middle layer for all in between, for each kind of layers."""
    assert Depth((9,), 2, 1).templates() == [0, 1, 2, 2, 2, 2, 2, 3, 4]
    assert Depth((9,), 2, 1).middles() == [range(2, 4)]
    assert Depth((3, 7), 2, 1).templates() == [0, 1, 2, 3, 4, 5, 5, 5, 6, 7]
    assert Depth((3, 7), 2, 1).middles() == [range(5, 7)]
    assert Depth((4,), 2, 1).templates() == [0, 1, 2, 3]


def made_up(layers: int, sizes: Sequence[int], *, far: bool = False) -> Trace:
    """A step in which each layer makes a tensor forward and frees it backward; `far`: it frees the opposite one's."""
    weights = [Allocation(1, (), "weight") for _ in range(layers)]
    kept = [Allocation(sizes[layer], ("step:1", "forward"), "kept") for layer in range(layers)]
    events = [Event(weight, False, ()) for weight in weights]
    for layer, allocation in enumerate(kept):
        scope = ("step:1", "forward", f"attention:{layer}")
        allocation.scope = scope
        events.append(Event(allocation, False, scope))
    for layer in reversed(range(layers)):
        freed = kept[layers - 1 - layer if far else layer]
        events.append(Event(freed, True, ("step:1", "backward", f"attention:{layer}")))
    owners = {id(weight): layer for layer, weight in enumerate(weights)}
    return Trace(events, [], owners)


def test_a_made_up_step_is_repeated() -> None:
    """Forward and backward have a tensor for each of twelve layers, named for its layer, freed where it was made."""
    deep = repeated(made_up(5, [7] * 5), Depth((12,), 2, 1), step="step:1")

    inside = [event for event in deep.events if "step:1" in event.scope]
    made, freed = inside[:12], inside[12:]
    assert [event.scope[-1] for event in made] == [f"attention:{layer}" for layer in range(12)]
    assert [event.allocation for event in freed] == [event.allocation for event in reversed(made)]
    assert len(deep.events) == 36


@pytest.mark.parametrize(
    ("trace", "why"),
    [
        (made_up(5, [7, 7, 7, 8, 7]), r"layers \[2, 3\] differ in forward"),
        (made_up(5, [7] * 5, far=True), "differ in backward"),
        (made_up(4, [7] * 4), r"a pass of before visits layers \[0, 1, 2, 3\]"),
    ],
)
def test_a_step_of_another_form_is_refused(trace: Trace, why: str) -> None:
    """Unequal middle layers, frees across the model and a missing layer are named, and nothing is repeated."""
    with pytest.raises(NotPeriodic, match=why):
        repeated(trace, Depth((12,), 2, 1), step="step:1")


def test_memory_without_an_owner_is_refused() -> None:
    """What is alive before the step and belongs to no one might be one a layer, or not."""
    trace = made_up(5, [7] * 5)
    trace.owners = {}

    with pytest.raises(NotPeriodic, match="have no owner"):
        repeated(trace, Depth((12,), 2, 1), step="step:1")


@pytest.mark.slow
@pytest.mark.parametrize("saved", [3, 7])
def test_layers_of_two_kinds_are_repeated_apart(saved: int) -> None:
    """The first layers keep their attention output in host memory and the others do not; both kinds are repeated."""
    c = case("ulysses", "long", "cuda", layers=14, save_attention=saved)
    loaded = registry.load(c.method, c.options)
    few, every = traced_step(c, loaded), traced_step(c, loaded, edges=())

    assert few.layers < every.layers
    assert spelled(few.trace) == spelled(every.trace)
    assert host_peak_bytes(few.trace.events) == host_peak_bytes(every.trace.events)
