"""The process group of one rank, few layers, and what an emulated record says; against real ranks: `test_exactness`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.method import Layout
from cpbench.model_config import ModelConfig
from cpbench.record import Record
from cpbench.resolve import resolve
from cpbench.runtime.collectives import CollectiveLog, Group, all_to_all_heads, ring_pass
from cpbench.runtime.python_group import counting
from cpbench.runtime.recorder import Recorder
from cpbench.train import World
from cpbench.world.emulate import EmulatedGroup, emulated_world
from cpbench.world.run import run_case

# torch 2.13 has new names for these two, and 2.11 only the old ones.
gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SMALL = ModelConfig(
    hidden_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, ffn_dim=80, vocab_size=97
)
FACTS: dict[str, Any] = {
    "machine": None,
    "cpbench_version": "0",
    "git_commit": None,
    "method_source_hash": None,
    "started": "2026-01-01T00:00:00+00:00",
    "duration_seconds": 1.0,
}


def small_case(**changes: Any) -> Case:  # noqa: ANN401 - any field of a case
    fields: dict[str, Any] = {
        "method": "ulysses",
        "model": "small",
        "architecture": SMALL,
        "seq_len": 64,
        "world_size": 4,
        "dtype": "float32",
        "mode": "emulate",
        "steps": 2,
    }
    case, unsupported = resolve(Case(**fields | changes), [])
    assert unsupported is None
    return case


@pytest.fixture
def world() -> Iterator[World]:
    """Rank 2 of 4: Ulysses pairs (2, 3), rings (0, 2)."""
    layout = Layout(ulysses_degree=2, ring_degree=2, segments=((0, 16),))
    with emulated_world(small_case(), layout, 2) as made:
        yield made


def group_of(group: Group) -> EmulatedGroup:
    assert isinstance(group.handle, EmulatedGroup)
    return group.handle


def test_groups_are_those_of_the_rank(world: World) -> None:
    """Sub-groups have their own sizes and ranks, and torch finds them by name."""
    assert (world.ulysses.size, world.ulysses.rank, world.ulysses.global_ranks) == (2, 0, (2, 3))
    assert (world.ring.size, world.ring.rank, world.ring.global_ranks) == (2, 1, (0, 2))
    assert (dist.get_rank(), dist.get_world_size()) == (2, 4)
    names = {group_of(group).group_name for group in (world.ulysses, world.ring)}
    assert len(names) == 2
    assert group_of(world.ulysses).rank() == 0


def test_a_sum_is_that_of_equal_ranks(world: World) -> None:
    """SUM multiplies, AVG and MAX keep; a product would overflow, so it is refused."""
    for operation, factor in ((dist.ReduceOp.SUM, 4), (dist.ReduceOp.AVG, 1), (dist.ReduceOp.MAX, 1)):
        value = torch.tensor([3.0, -1.0])
        dist.all_reduce(value, operation)
        assert value.tolist() == [3.0 * factor, -1.0 * factor]
    with pytest.raises(NotImplementedError, match="SUM, AVG, MAX or MIN"):
        dist.all_reduce(torch.ones(1), dist.ReduceOp.PRODUCT)


def test_a_broadcast_is_sent_by_its_root(world: World) -> None:
    """Its bytes count on rank 2 when it is the root, and nothing counts when it is not; the value stays."""
    for root, sent in ((2, {"broadcast": 8}), (1, {})):
        log, value = CollectiveLog(), torch.tensor([3.0, -1.0])
        with counting(log):
            dist.broadcast(value, root)
        assert (log.bytes, value.tolist()) == (sent, [3.0, -1.0])


def test_own_bytes_fill_every_slot(world: World) -> None:
    """All-gather repeats this rank's part, in place or not; reduce-scatter takes this rank's slot."""
    whole = torch.full((4, 3), torch.nan)
    gather(whole, torch.tensor([1.0, 2.0, 3.0]))
    assert whole.tolist() == [[1.0, 2.0, 3.0]] * 4

    inside = torch.full((12,), torch.nan)
    inside[6:9] = torch.tensor([1.0, 2.0, 3.0])
    gather(inside, inside[6:9])
    assert inside.tolist() == [1.0, 2.0, 3.0] * 4

    part = torch.empty(3)
    scatter(part, torch.arange(12.0), op=dist.ReduceOp.AVG)
    assert part.tolist() == [6.0, 7.0, 8.0]


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("_allgather_base", "all_gather_single"),
        ("_reduce_scatter_base", "reduce_scatter_single"),
        ("alltoall_base", "all_to_all_single"),
        ("allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
        ("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"),
    ],
)
def test_both_torch_versions_find_their_name(older: str, newer: str, world: World) -> None:
    """torch 2.11 calls the older names, 2.13 the newer ones: the same result, counted the same."""
    many, gathers = older.endswith("coalesced"), "gather" in older
    logs, outputs = [], []
    for name in (older, newer):
        log, group = CollectiveLog(), group_of(world.ulysses)
        given = torch.arange(8.0)
        output = torch.full((16 if gathers else 4 if "scatter" in older else 8,), torch.nan)
        with counting(log):
            getattr(group, name)(*(([output], [given]) if many else (output, given))).wait()
        logs.append(log.sequence)
        outputs.append(output.tolist())
    assert logs[0] == logs[1]
    assert len(logs[0]) == 1
    assert outputs[0] == outputs[1]
    assert not torch.tensor(outputs[0]).isnan().any()


def test_all_to_all_gives_back_what_is_sent(world: World) -> None:
    """The runtime's exchange has the shape of a real one and this rank's own values; unequal splits are filled."""
    t = torch.randn(1, 8, 4, 6)
    received = all_to_all_heads(t, world.ulysses, Recorder())
    assert received.shape == (1, 16, 2, 6)
    assert sorted(received.flatten().tolist()) == sorted(t.flatten().tolist())

    output = torch.full((5,), torch.nan)
    dist.all_to_all_single(output, torch.tensor([1.0, 2.0]), [1, 2, 1, 1], [1, 1, 0, 0])
    assert output.tolist() == [1.0, 2.0, 1.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("splits", "sent"), [([1, 1, 0, 0], 8), ([1, 0, 1, 0], 4), ([0, 0, 2, 0], 0), ([], 6)]
)
def test_what_a_rank_keeps_of_an_exchange_is_not_sent(splits: list[int], sent: int, world: World) -> None:
    """Of unequal splits, everything but this rank's own; of equal ones, 3 of 4 parts."""
    log = CollectiveLog()
    given = torch.zeros(2 if splits else 4, dtype=torch.float32 if splits else torch.int16)
    with counting(log):
        dist.all_to_all_single(torch.empty_like(given), given, [], splits)
    assert log.bytes == {"all_to_all": sent}


def test_messages_come_back_in_order(world: World) -> None:
    """A ring pass receives what it sends; a receive may come first; one without a send gives zeros at its wait."""
    sent = torch.arange(6.0).view(2, 3), torch.ones(2)
    received = ring_pass(sent, world.ring).wait()
    assert [t.tolist() for t in received] == [t.tolist() for t in sent]

    early = torch.full((2,), torch.nan)
    receiving = dist.irecv(early, 0, group=world.ring.handle)
    sending = dist.isend(torch.tensor([5.0, 6.0]), 0, group=world.ring.handle)
    for work in (receiving, sending):
        assert work is not None
        work.wait()
    assert early.tolist() == [5.0, 6.0]

    lonely = torch.full((2,), torch.nan)
    work = dist.irecv(lonely, 0, group=world.ring.handle)
    assert work is not None
    work.wait()
    assert lonely.tolist() == [0.0, 0.0]
    assert not group_of(world.ring)._expected


def test_counting_is_the_rule_of_the_runtime(world: World) -> None:
    """Bytes to others by kind, of every group, in order; a barrier counts nothing, and nothing counts outside."""
    log = CollectiveLog()
    with counting(log):
        dist.all_reduce(torch.ones(8))
        all_to_all_heads(torch.randn(1, 8, 4, 6), world.ulysses, Recorder())
        ring_pass((torch.ones(4),), world.ring).wait()
        gather(torch.empty(8), torch.ones(2))
        dist.barrier()
    dist.all_reduce(torch.ones(8))
    assert log.sequence == [("all_reduce", 48), ("all_to_all", 384), ("send", 16), ("all_gather", 24)]


def test_a_world_larger_than_the_machine_stays_finite(tmp_path: Path) -> None:
    """Sixteen ranks of which the last holds a padded shard, over five steps."""
    case = small_case(method="ring", world_size=16, rank=15, steps=4, seq_len=128)
    (report,) = run_case(case, [], tmp_path).ranks
    assert report.rank == 15
    assert len(report.losses) == 5
    assert None not in report.losses + report.grad_norms


def test_time_is_told_apart(tmp_path: Path) -> None:
    """Compute is measured; without modelled communication there is no step time and no rate, and a note says why."""
    case = small_case()
    report = run_case(case, [], tmp_path)
    record = Record.from_ranks(case, report, FACTS)
    assert (record.status, record.mode, record.rank) == ("ok", "emulate", 0)
    assert record.compute_seconds
    assert record.communication_seconds is None
    assert (record.step_seconds, record.step_seconds_samples, record.tokens_per_second) == (None, (), None)
    assert any("not modelled" in note for note in record.notes)
    assert record.estimated_peak_bytes == record.peak_allocated_bytes

    modelled = report.model_copy(update={"communication_seconds": 0.5})
    record = Record.from_ranks(case, modelled, FACTS)
    assert record.step_seconds == pytest.approx((record.compute_seconds or 0) + 0.5)
    assert record.tokens_per_second == pytest.approx(case.seq_len / (record.step_seconds or 1))


def test_few_layers_are_stated_and_scaled_by_two_counts(tmp_path: Path) -> None:
    """Four of ten layers: two were timed too, and the line through both gives the time of ten; memory stays."""
    few = SMALL.model_copy(update={"num_layers": 4})
    case = small_case(architecture=few, model_layers=10)
    report = run_case(case, [], tmp_path)
    record = Record.from_ranks(case, report, FACTS)
    (rank,) = record.ranks
    assert rank.shallow is not None
    assert rank.shallow.layers == 2
    shallow, compute = torch.tensor(rank.shallow.step_seconds).double().mean().item(), record.compute_seconds
    assert compute is not None
    assert record.compute_seconds_of_model == pytest.approx(compute + 6 * (compute - shallow) / 2, rel=1e-6)
    assert (record.architecture.num_layers, record.model_layers) == (4, 10)
    assert any("4 of the model's 10 layers" in note for note in record.notes)


@pytest.mark.parametrize(
    ("layers", "stack"), [(1, {}), (2, {"save_attention": 1})], ids=["one layer", "two kinds of layers"]
)
def test_what_cannot_be_scaled_is_not(layers: int, stack: dict[str, int], tmp_path: Path) -> None:
    """One layer count, or layers that differ, give no time for the whole model; the note says so."""
    architecture = SMALL.model_copy(update={"num_layers": layers})
    case = small_case(architecture=architecture, model_layers=4)
    case = case.model_copy(update={"stack": case.stack.model_copy(update=stack)})
    record = Record.from_ranks(case, run_case(case, [], tmp_path), FACTS)
    assert record.compute_seconds_of_model is None
    assert any("nothing is scaled" in note for note in record.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"mode": "measure", "rank": 1}, "all ranks are measured"), ({"rank": 4}, "below world_size=4")],
)
def test_a_rank_that_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    """A rank makes sense for one that runs alone, and must exist."""
    requested = small_case().model_copy(update=change)
    assert words in str(resolve(requested, [])[1])


def test_the_group_is_gone_afterwards() -> None:
    """A failure inside leaves no process group behind."""
    layout = Layout(ulysses_degree=4, ring_degree=1, segments=((0, 16),))
    with pytest.raises(Unsupported, match="planted"), emulated_world(small_case(), layout, 0):
        raise Unsupported("planted")
    assert not dist.is_initialized()
