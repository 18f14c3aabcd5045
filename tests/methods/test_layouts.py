"""Token layouts and head schedules, for any sizes that divide."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.method import contiguous_segments, hybrid_segments, zigzag_segments
from cpbench.model_config import ModelConfig
from methods.upipe import Stages
from methods.usp import Usp

small = st.integers(1, 6)


def positions(segments: tuple[tuple[int, int], ...]) -> list[int]:
    return list(chain.from_iterable(range(start, stop) for start, stop in segments))


@given(ranks=small, tokens=small)
def test_contiguous_ranks_hold_the_sequence_in_order(ranks: int, tokens: int) -> None:
    """Rank after rank, every position comes once and in order."""
    held = chain.from_iterable(positions(contiguous_segments(ranks * tokens, ranks, r)) for r in range(ranks))

    assert list(range(ranks * tokens)) == list(held)


@given(ranks=small, tokens=small)
def test_zigzag_covers_everything_and_balances_causal_work(ranks: int, tokens: int) -> None:
    """Every position is held once, and every rank's positions have the same sum, hence the same causal work."""
    held = [positions(zigzag_segments(2 * ranks * tokens, ranks, r)) for r in range(ranks)]

    assert list(range(2 * ranks * tokens)) == sorted(chain.from_iterable(held))
    assert len({sum(p) for p in held}) == 1


@given(degree=small, ring=small, tokens=small)
def test_a_ring_rank_of_a_hybrid_holds_its_zigzag_chunks_in_order(
    degree: int, ring: int, tokens: int
) -> None:
    """Joining a Ulysses group's tokens gives the zigzag order of its ring rank: no leak after the all-to-all."""
    seq_len = 2 * ring * degree * tokens
    for ring_rank in range(ring):
        ranks = range(ring_rank * degree, (ring_rank + 1) * degree)
        joined = chain.from_iterable(positions(hybrid_segments(seq_len, degree, ring, r)) for r in ranks)
        expected = zigzag_segments(seq_len, ring, ring_rank) if ring > 1 else ((0, seq_len),)

        assert positions(expected) == list(joined)


@given(degree=small, per_rank=small, ratio=small, kv=st.integers(1, 12))
def test_every_query_head_meets_its_own_kv_head_once(degree: int, per_rank: int, ratio: int, kv: int) -> None:
    """For any stage size, stages cover the heads once, split evenly over ranks, and K/V groups hold their heads."""
    heads = kv * ratio
    assume(heads % (degree * per_rank) == 0)
    model = ModelConfig(
        hidden_dim=8, num_layers=1, num_heads=heads, num_kv_heads=kv, head_dim=2, ffn_dim=8, vocab_size=8
    )

    stages = Stages.of(model, degree, degree * per_rank)

    seen: list[int] = []
    for group in stages.groups():
        assert (group.stop - group.start) % degree == 0
        originals = range(kv)[stages.originals(group)]
        for turn in stages.turns():
            of_stage = [
                copy * stages.ratio + r
                for copy in range(group.start, group.stop)
                for r in range(stages.ratio)[turn]
            ]
            assert len(of_stage) == degree * per_rank
            assert {head // ratio for head in of_stage} <= set(originals)
            seen += of_stage
    assert list(range(heads)) == sorted(seen)


def test_published_schedule_for_sixteen_heads_over_four_kv_heads() -> None:
    """With 16 heads, 4 KV heads and 4 ranks, stage r takes heads r, 4+r, 8+r, 12+r and K/V move once (paper, 4.2)."""
    model = ModelConfig(
        hidden_dim=8, num_layers=1, num_heads=16, num_kv_heads=4, head_dim=2, ffn_dim=8, vocab_size=8
    )

    stages = Stages.of(model, 4, 4)

    assert [slice(0, 4)] == list(stages.groups())
    assert [slice(r, r + 1) for r in range(4)] == list(stages.turns())


def test_a_wide_stage_takes_several_queries_of_one_kv_head() -> None:
    """U = 2C with as many KV heads as ranks: two query heads of each KV head a stage, so K/V stay one head a rank."""
    model = ModelConfig(
        hidden_dim=8, num_layers=1, num_heads=32, num_kv_heads=8, head_dim=2, ffn_dim=8, vocab_size=8
    )

    stages = Stages.of(model, 8, 16)

    assert (stages.group, stages.per_stage) == (8, 2)


@pytest.mark.parametrize(("heads", "ranks", "ring"), [(32, 8, 1), (40, 16, 2), (12, 16, 4), (7, 4, 4)])
def test_usp_takes_the_smallest_ring_whose_groups_divide_the_heads(heads: int, ranks: int, ring: int) -> None:
    """Without a ring degree, any number of ranks and heads has a mesh; the mesh covers every token once."""
    model = ModelConfig(
        hidden_dim=8, num_layers=1, num_heads=heads, num_kv_heads=1, head_dim=2, ffn_dim=8, vocab_size=8
    )
    case = Case(method="usp", model="small", architecture=model, seq_len=6 * ranks, world_size=ranks)
    method = Usp()

    method.check(case)
    layouts = [method.layout(case, rank) for rank in range(ranks)]

    assert {(layout.ulysses_degree, layout.ring_degree) for layout in layouts} == {(ranks // ring, ring)}
    held = sorted(chain.from_iterable(positions(layout.segments) for layout in layouts))
    assert held == list(range(6 * ranks))


def test_usp_names_the_degrees_that_fit() -> None:
    """A ring degree that leaves heads over is refused with those that would do."""
    model = ModelConfig(
        hidden_dim=8, num_layers=1, num_heads=6, num_kv_heads=1, head_dim=2, ffn_dim=8, vocab_size=8
    )
    case = Case(method="usp", model="small", architecture=model, seq_len=96, world_size=8)

    with pytest.raises(Unsupported, match=r"set usp\.ring_degree to one of 4, 8"):
        Usp(ring_degree=2).check(case)
