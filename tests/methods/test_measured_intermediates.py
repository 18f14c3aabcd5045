"""What head-chunking saves, measured by the allocator in real processes."""

from __future__ import annotations

import pytest

from cpbench.case import STACKS, Case, OptionValue
from cpbench.model_config import ModelConfig
from cpbench.record import Memory
from cpbench.resolve import resolve
from tests.cpbench.many_cases import measure

HEADS, WORLD = 16, 4
VARIANTS: dict[str, tuple[str, dict[str, OptionValue]]] = {
    "ulysses": ("ulysses", {}),
    "published": ("upipe", {"published": True}),
    "default": ("upipe", {}),
}


def case_of(variant: str, kv_heads: int) -> Case:
    method, options = VARIANTS[variant]
    model = ModelConfig(
        hidden_dim=128,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        head_dim=64,
        ffn_dim=136,
        vocab_size=251,
    )
    requested = Case(
        method=method,
        options=options,
        model="wide",
        architecture=model,
        seq_len=1024,
        world_size=WORLD,
        dtype="float32",
        stack=STACKS["long"],
        steps=1,
    )
    case, unsupported = resolve(requested, [])
    assert unsupported is None
    return case


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Memory]:
    """Least over the ranks, which do the same here: what a transport frees late only adds."""
    keys = [(variant, kv_heads) for kv_heads in (HEADS, 4) for variant in VARIANTS]
    reports = measure(
        [case_of(*key) for key in keys], tmp_path_factory.mktemp("intermediates"), parts_tile=2**14
    )
    return {
        key: min((r.memory for r in ranks), key=lambda m: m.attention_stage_peak_bytes or 0)
        for key, ranks in zip(keys, reports, strict=True)
    }


def stage_peak(memory: Memory) -> int:
    assert memory.attention_stage_peak_bytes is not None
    return memory.attention_stage_peak_bytes


def whole_peak(memory: Memory) -> int:
    assert memory.attention_intermediate_peak_bytes is not None
    return memory.attention_intermediate_peak_bytes


@pytest.mark.slow
def test_with_equal_heads_the_published_intermediates_shrink_to_a_stage(
    memory: dict[tuple[str, int], Memory],
) -> None:
    """MHA: U of H heads at a time leave U/H of what Ulysses holds, within 2 %; here a quarter."""
    ratio = stage_peak(memory["published", HEADS]) / stage_peak(memory["ulysses", HEADS])

    assert ratio == pytest.approx(WORLD / HEADS, rel=0.02)


@pytest.mark.slow
def test_with_grouped_heads_keys_and_values_take_a_whole_stage(memory: dict[tuple[str, int], Memory]) -> None:
    """GQA 4:1: a stage holds q, out, dout, dq and k, v, dk, dv twice summed, 4m + 6m; Ulysses 4M + 4M/4: a half."""
    width = 1024 // WORLD * HEADS * 64 * 4
    stage, row_sums = width * WORLD // HEADS, width // 64
    expected = (10 * stage + row_sums) / (5 * width + row_sums)
    ratio = stage_peak(memory["published", 4]) / stage_peak(memory["ulysses", 4])

    assert expected == pytest.approx(0.5, rel=0.01)
    assert ratio == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [HEADS, 4])
def test_the_default_needs_less_than_the_published_scheme(
    memory: dict[tuple[str, int], Memory], kv_heads: int
) -> None:
    """Nothing of full width is left: the block holds little more than half, and a stage no more than it did."""
    default, published = memory["default", kv_heads], memory["published", kv_heads]

    assert whole_peak(default) < 0.65 * whole_peak(published)
    assert stage_peak(default) < stage_peak(published)
    assert whole_peak(published) < whole_peak(memory["ulysses", kv_heads])
