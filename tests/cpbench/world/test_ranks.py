"""Which ranks an estimate runs, and what it refuses to count."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cpbench import registry
from cpbench.case import STACKS, Case, OptionValue
from cpbench.errors import Uncountable
from cpbench.method import AttentionWeights
from cpbench.model_config import ModelConfig
from cpbench.rank_report import RankReport
from cpbench.resolve import resolve
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.kernels import declare_scratch
from cpbench.worker import classify
from cpbench.world.estimate import estimate_case, estimate_ranks, ranks_to_run
from methods.ulysses import Ulysses

WORLD = 4


def case(method: str, options: dict[str, OptionValue] | None = None) -> Case:
    model = ModelConfig(
        hidden_dim=64, num_layers=1, num_heads=8, num_kv_heads=8, head_dim=16, ffn_dim=96, vocab_size=104
    )
    requested = Case(
        method=method,
        options=options or {},
        model="small",
        architecture=model,
        seq_len=2**19,
        world_size=WORLD,
        stack=STACKS["checkpoint"],
        mode="estimate",
        device="cuda",
        hardware="h100-80g",
    )
    resolved, unsupported = resolve(requested, [])
    assert unsupported is None
    return resolved


@pytest.mark.parametrize(
    ("method", "options", "wanted"),
    [
        ("upipe", {}, (0,)),
        ("usp", {"ring_degree": 2}, (0, 2)),
        ("usp", {"ring_degree": 4}, (2,)),
        ("ring", {}, (2,)),
        ("ring", {"layout_order": "contiguous"}, (2, 3)),
        ("torch-ring", {}, (2,)),
    ],
)
def test_places_of_a_ring_stand_for_all(
    method: str, options: dict[str, OptionValue], wanted: tuple[int, ...]
) -> None:
    """One rank of a Ulysses group; of a ring the last place but one, and a busier one if there is; of two both."""
    c = case(method, options)
    loaded = registry.load(c.method, c.options)

    assert ranks_to_run(c, loaded) == wanted


def most(ranks: tuple[RankReport, ...]) -> tuple[int, int, float]:
    return (
        max(rank.memory.peak_allocated_bytes or 0 for rank in ranks),
        max(rank.memory.host_pinned_peak_bytes or 0 for rank in ranks),
        max(rank.samples[0].step_seconds for rank in ranks),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ulysses", {}),
        ("ring", {}),
        ("ring", {"layout_order": "contiguous"}),
        ("torch-ring", {}),
        ("torch-ring", {"rotate": "alltoall"}),
        ("usp", {"ring_degree": 2}),
        ("upipe", {"ring_degree": 4}),
    ],
)
def test_the_ranks_that_run_need_as_much_as_any(method: str, options: dict[str, OptionValue]) -> None:
    """Peak and host memory are the largest of all four ranks, though rank 0 may need less; step time within 1 %."""
    c = case(method, options)
    loaded = registry.load(c.method, c.options)
    every = tuple(estimate_case(c, loaded, rank=rank).ranks[0] for rank in range(WORLD))

    *memory, seconds = most(estimate_ranks(c, loaded).ranks)
    *most_memory, most_seconds = most(every)
    assert memory == most_memory
    assert 0.99 * most_seconds <= seconds <= most_seconds
    if method == "ring":
        assert most(every[:1])[0] < most_memory[0]


def test_the_rank_that_was_asked_for_runs_alone() -> None:
    """`--rank 3` of a ring of four."""
    c = case("ring").model_copy(update={"rank": 3})

    assert [rank.rank for rank in estimate_ranks(c, registry.load(c.method, c.options)).ranks] == [3]


@torch.library.custom_op("cpbench_test::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    """A copy, with who knows what inside."""
    return x.clone()


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("cpbench_test::stated", mutates_args=())
def stated(x: Tensor) -> Tensor:
    """A copy that says what it takes."""
    return x.clone()


@stated.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


INSIDE = 2**33
declare_scratch(torch.ops.cpbench_test.stated.default, lambda args: INSIDE)


@dataclass(frozen=True, kw_only=True)
class Strange(Ulysses):
    """Ulysses that runs one more operator."""

    what: str = "mystery"

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        with torch.no_grad():
            if self.what == "broadcast":
                dist.broadcast(x.detach().clone(), 0)
            else:
                getattr(torch.ops.cpbench_test, self.what)(x)
        return Ulysses.attention(self, x, weights, ctx)


@pytest.mark.parametrize(
    ("what", "name"), [("mystery", "cpbench_test::mystery"), ("broadcast", "c10d::broadcast_")]
)
def test_what_cannot_be_counted_is_invalid_and_named(what: str, name: str) -> None:
    """A custom operator of unknown memory, and a collective of unknown bytes."""
    with pytest.raises(Uncountable, match=name) as refusal:
        estimate_case(case("ulysses"), Strange(what=what))

    assert classify(refusal.value)[0] == "invalid"


def test_stated_scratch_is_counted() -> None:
    """An operator whose file says what it allocates inside adds that to the peak."""
    c = case("ulysses")
    (plain,), (more,) = (estimate_case(c, method).ranks for method in (Ulysses(), Strange(what="stated")))

    # The operator runs at a moment of its own, at which less than the peak may be alive.
    added = (more.memory.peak_allocated_bytes or 0) - (plain.memory.peak_allocated_bytes or 0)
    assert 0.9 * INSIDE < added <= INSIDE
    assert more.memory.peak_by_category_bytes["kernel_scratch"] >= INSIDE
