"""UPipe's memory: its closed forms over all its options, and what it saves against the published scheme and Ulysses."""

from __future__ import annotations

from typing import Any

import pytest

from cpbench import registry
from cpbench.block_count import BlockCount, count_block
from cpbench.case import STACKS, Case, OptionValue
from cpbench.model_config import ModelConfig
from cpbench.resolve import resolve

Options = dict[str, OptionValue]


def case_of(
    method: str,
    options: Options,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    hidden: int = 4096,
    biases: bool = False,
    world_size: int = 8,
    seq_len: int = 2**22,
    **changes: Any,  # noqa: ANN401 - fields of a case
) -> Case:
    model = ModelConfig(
        hidden_dim=hidden,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        ffn_dim=2 * hidden,
        vocab_size=1024,
        attention_bias=biases,
    )
    requested = Case.model_validate(
        {
            "method": method,
            "options": options,
            "model": "wide",
            "architecture": model,
            "seq_len": seq_len,
            "world_size": world_size,
            "stack": STACKS["long"],
            "mode": "estimate",
            "device": "cuda",
        }
        | changes
    )
    case, unsupported = resolve(requested, [])
    assert unsupported is None
    return case


def counted(case: Case) -> BlockCount:
    return count_block(case, registry.load(case.method, case.options), rank=case.world_size - 1)


def full_width(case: Case) -> int:
    """M, the bytes of one tensor of all query heads of a rank's tokens."""
    return case.tokens_per_rank * case.architecture.attention_dim * 2


PLAIN: list[tuple[Options, int]] = [
    (options, kv_heads)
    for kv_heads in (32, 8, 4)
    for options in (
        {},
        {"published": True},
        {"keep_output": "device"},
        {"keep_output": "recompute"},
        {"overlap": True},
        {"overlap": True, "keep_output": "device"},
        {"stage_heads": 16},
        {"stage_heads": 32},
        {"stage_heads": 32, "published": True},
    )
]
RINGS: list[tuple[Options, int]] = [
    ({"ring_degree": 2}, 4),
    ({"ring_degree": 4, "keep_output": "device", "stage_heads": 8}, 32),
    ({"ring_degree": 8, "overlap": True, "stage_heads": 8}, 8),
    ({"ring_degree": 8, "published": True, "stage_heads": 8}, 8),  # nothing is exchanged: stages have views
    ({"ring_degree": 8, "published": True, "stage_heads": 32}, 32),
]


@pytest.mark.parametrize(("options", "kv_heads"), [*PLAIN, *RINGS], ids=str)
def test_every_option_has_its_closed_form(options: Options, kv_heads: int) -> None:
    """Counted collective bytes equal the formulas, counted peaks are within 1 % of them."""
    case = case_of("upipe", options, kv_heads=kv_heads)
    costs = registry.load("upipe", case.options).costs(case)
    count = counted(case)

    assert count.forward.bytes == costs.forward_collective_bytes
    assert count.backward.bytes == costs.backward_collective_bytes
    assert count.forward_peak_bytes == pytest.approx(costs.forward_peak_bytes, rel=0.01)
    assert count.backward_peak_bytes == pytest.approx(costs.backward_peak_bytes, rel=0.01)


def test_on_cpu_nothing_waits_for_a_copy() -> None:
    """There a copy to the host is done when the call returns, so no part is left on its way; biases weigh nothing."""
    case = case_of("upipe", {}, biases=True, device="cpu", dtype="float32")
    costs = registry.load("upipe", case.options).costs(case)
    count = counted(case)

    assert count.forward_peak_bytes == pytest.approx(costs.forward_peak_bytes, rel=0.01)
    assert count.backward_peak_bytes == pytest.approx(costs.backward_peak_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "hidden", "forward", "backward"),
    [(32, 8, 4096, 2.77, 7.03), (64, 8, 5120, 1.89, 4.78)],
)
def test_the_published_scheme_needs_what_was_counted_on_its_code(
    heads: int, kv_heads: int, hidden: int, forward: float, backward: float
) -> None:
    """In units of M: forward beyond its input; backward with x, out, dout and dx (dy was not counted)."""
    case = case_of("upipe", {"published": True}, heads=heads, kv_heads=kv_heads, hidden=hidden)
    width = full_width(case)
    count = counted(case)
    residual = case.tokens_per_rank * hidden * 2

    assert count.forward_peak_bytes / width == pytest.approx(forward, rel=0.01)
    assert (count.backward_total_bytes - residual) / width == pytest.approx(backward, rel=0.01)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "hidden"), [(32, 8, 4096), (32, 32, 4096), (32, 4, 4096), (64, 8, 5120)]
)
def test_the_default_stays_below_three_hidden_tensors_and_twelve_of_a_stage(
    heads: int, kv_heads: int, hidden: int
) -> None:
    """Backward of the whole block, x, dy and dx included, is at most 3D + 12m, and far below the published scheme's."""
    case = case_of("upipe", {}, heads=heads, kv_heads=kv_heads, hidden=hidden)
    published = case_of("upipe", {"published": True}, heads=heads, kv_heads=kv_heads, hidden=hidden)
    residual = case.tokens_per_rank * hidden * 2
    stage = full_width(case) * case.world_size // heads
    count, other = counted(case), counted(published)

    assert count.backward_total_bytes <= 3 * residual + 12 * stage
    # Two of the three are there at a time: dx is made when the stages are done.
    assert count.backward_total_bytes <= 1.01 * (2 * residual + 12 * stage)
    assert count.backward_total_bytes <= 0.65 * other.backward_total_bytes
    assert count.forward_total_bytes < other.forward_total_bytes


def test_a_saved_output_needs_no_attention_in_the_recomputation() -> None:
    """With the output in host memory the recomputation sends nothing, and the host holds the output and row sums."""
    case = case_of("upipe", {})
    method = registry.load("upipe", case.options)
    saving = count_block(case, method, save_attention=True)
    plain = count_block(case, method)
    row_sums = case.tokens_per_rank * case.architecture.num_heads * 4

    assert plain.recomputation.bytes == plain.forward.bytes
    assert saving.recomputation.bytes == {}
    assert saving.backward.bytes == plain.backward.bytes
    kv = full_width(case) * case.architecture.num_kv_heads // case.architecture.num_heads
    assert (
        saving.host_bytes == full_width(case) + row_sums + 2 * kv
    )  # slabs of the outputs serve the dq after them
