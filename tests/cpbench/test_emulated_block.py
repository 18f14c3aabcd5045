"""A block of PyTorch's own ring, recorded on CPU as each rank in turn: exact, named, and the same each time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

from cpbench import block_names, block_recorder
from cpbench.block_schedule import BlockSchedule, PhaseName
from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.report import method_pages

Ring = Callable[..., tuple[Tensor, ...]]
PHASES: tuple[PhaseName, ...] = ("forward", "backward")


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def request(rotate: str = "allgather", **changes: object) -> Case:
    (case, _) = method_pages.cases(["torch-ring"])
    return Case.model_validate(case.model_dump() | {"options": {"rotate": rotate}, "world_size": 2} | changes)


def record(case: Case) -> BlockSchedule:
    (schedule,) = block_recorder.record([case], []).schedules
    return schedule


def differences(case: Case) -> list[str]:
    """Where the ranks differ from `costs`, which states the bytes of each and the largest peaks of any."""
    ranks = block_recorder.emulate_ranks(case, [])
    found = []
    for phase in PHASES:
        if max(getattr(s, f"{phase}_peak_bytes") for s in ranks) != getattr(
            ranks[0], f"stated_{phase}_peak_bytes"
        ):
            found.append(f"{phase} peak")
        if any(s.sent_by_kind(phase) != s.stated_sent[phase] for s in ranks):
            found.append(f"{phase} sends")
    return found


@pytest.mark.parametrize("rotate", ["allgather", "alltoall"])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peaks_and_bytes_are_those_of_costs(ranks: int, rotate: str, dtype: str) -> None:
    """Byte for byte, in an even and an odd ring, with both rotations and both dtypes."""
    assert differences(request(rotate, world_size=ranks, seq_len=128 * ranks, dtype=dtype)) == []


def test_the_rank_that_needs_most_is_kept() -> None:
    """Of four ranks the first of those with both peaks the highest: neither the first of all nor the last."""
    for kept in method_pages.load("torch-ring"):
        assert (kept.emulated, kept.rank) == (True, 1)


def test_a_recording_is_the_same_each_time() -> None:
    """What is kept is what a run on this machine gives, in every bar, every byte of every slot, and every name."""
    (kept, _) = method_pages.load("torch-ring")

    fresh = record(request(**kept.model_dump(include={"world_size", "seq_len"})))

    same = {"torch": kept.torch, "given": kept.given}
    assert fresh.model_copy(update=same) == kept


def test_a_buffer_too_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor of K's size, held by torch's backward, is not in the formula."""
    backward: Ring = torch_ring._templated_ring_attention_backward

    def held(*args: object, **given: object) -> tuple[Tensor, ...]:
        extra = torch.zeros_like(args[6])  # key
        found = backward(*args, **given)
        del extra
        return found

    monkeypatch.setattr(torch_ring, "_templated_ring_attention_backward", held)

    assert differences(request(world_size=3, seq_len=384)) == ["backward peak"]


def test_an_exchange_too_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation that sends each block twice."""
    exchange = torch_ring._AllToAllRotater.exchange_buffers

    def twice(self: torch_ring._AllToAllRotater, block: Tensor) -> None:
        exchange(self, block)
        self.next_buffer()
        exchange(self, block)

    monkeypatch.setattr(torch_ring._AllToAllRotater, "exchange_buffers", twice)

    found = differences(request("alltoall", world_size=3, seq_len=384))

    assert {"forward sends", "backward sends"} <= set(found)


def test_names_come_from_the_parts_of_a_packed_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of wk and wv are told apart only by where dk and dv lie in what arrived last."""
    assert [bar.name for bar in record(request()).bars][-6:] == ["dx", "dwq", "dx", "dwk", "dx", "dwv"]

    monkeypatch.setattr(block_names.NameOperators, "_parts_of", lambda *_: None)

    assert "?" in [bar.name for bar in record(request()).bars]


def test_what_cuda_would_refuse_is_refused() -> None:
    """The device is not asked, everything else is."""
    with pytest.raises(Unsupported, match="is not divisible by 4"):
        record(request(seq_len=510))
