"""One rank of `cpbench verify`: started by torchrun, checks every case of the job.

    torchrun ... -m cpbench.verify_worker job.json

The job is a `VerifyJob`.  Rank 0 adds a line to `<scratch>/answers.jsonl`, a `VerifyAnswer`, as soon as it has it, so
that an end without warning loses nothing.  Peaks are counted first, before there is a process group, each rank a
share.  A case of one rank runs on rank 0 alone.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, TypeAdapter

from cpbench.case import Case
from cpbench.progress_file import write_progress
from cpbench.record import write_text_atomically
from cpbench.shape import Shape
from cpbench.verification import Peaks, Verification, VerifyAnswer, VerifyEnd, VerifyItem, VerifyJob, title
from cpbench.worker import leave, run_rank

if TYPE_CHECKING:
    from cpbench.parity.rank import ParityRank

ANSWERS = "answers.jsonl"
_COUNTING_SECONDS = 3600.0  # ended sooner by the limit of the launch
_POLL_SECONDS = 0.01
_Shares = TypeAdapter(dict[int, Peaks | None])


def verify(job: VerifyJob) -> VerifyEnd:
    """Verify every case of the job on this rank."""
    import torch
    import torch.distributed as dist

    from cpbench.parity import shared_gpu
    from cpbench.parity.rank import ParityRank
    from cpbench.parity.ranks import Ranks

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    board = _Board(job, rank, size)
    share = _Shares.dump_json(_count(job, rank, size)).decode()
    shares = [_Shares.validate_json(text) for text in board.exchange("peaks", share, _COUNTING_SECONDS)]
    peaks = {index: counted for found in shares for index, counted in found.items()}
    backend, device = "gloo", torch.device("cpu")
    if job.case.device == "cuda":
        shared = torch.cuda.device_count() < size
        backend = shared_gpu.BACKEND if shared else "nccl"
        device = torch.device("cuda", 0 if shared else int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # A rank that waits for one that will not come is ended by this limit.
    limit = timedelta(seconds=job.collective_seconds)
    dist.init_process_group(backend, timeout=limit)
    torch.set_num_threads(1)  # blocks are tiny: more threads would only wait for one another
    everyone, alone = Ranks.make(device, limit)
    plugins = [Path(plugin) for plugin in job.plugins]
    prepared: dict[int, tuple[Shape, ParityRank]] = {}
    checked = 0
    for index, item in enumerate(job.items):
        if rank == 0:
            _tell(job, f"{title(item.case.method, item.given)} at {Shape.of(item.case).title}", index)
        ranks = everyone if item.case.world_size == size else alone
        if ranks is everyone or rank == 0:

            def check(item: VerifyItem = item, index: int = index, ranks: Ranks = ranks) -> Verification:
                # For all ranks and for one, the last shape is kept: rank 0 must prepare no more often than the others.
                known = prepared.get(ranks.size)
                if known is None or known[0] != Shape.of(item.case):
                    known = Shape.of(item.case), ParityRank(item.case, plugins, ranks, alone)
                    prepared[ranks.size] = known
                return known[1].verify(item.case, item.stacks, peaks.get(index))

            result, failure = _attempt(check)
            together = True
            if ranks is everyone:
                failure, together = board.agree(index, failure)
            if rank == 0:
                _answer(job, index, item, result if failure is None else None, failure)
            if not together:
                break
        checked = index + 1
    dist.destroy_process_group()
    return VerifyEnd(checked=checked)


def _attempt(check: Callable[[], Verification]) -> tuple[Verification | None, _Failure | None]:
    """Return the findings, or what came instead."""
    try:
        return check(), None
    except Exception as error:
        traceback.print_exc()
        return None, _Failure(time=time.time(), words=f"{type(error).__name__}: {error}")


class _Failure(BaseModel):
    """What a rank could not finish, and why."""

    time: float
    words: str


class _Board:
    """Where ranks tell one another how they fared: files, because collectives may be what failed."""

    def __init__(self, job: VerifyJob, rank: int, size: int) -> None:
        self._folder = Path(job.scratch)
        self._rank, self._size = rank, size
        # The others may only now begin to wait in a collective that fails no sooner.
        self._limit = 2 * job.collective_seconds

    def exchange(self, key: str, text: str, limit: float) -> list[str]:
        """Put up a text and return those of all ranks, in order.

        Raises:
            TimeoutError: a rank has put up nothing for `limit` seconds.
        """
        files = [self._folder / f"board-{key}-{rank}" for rank in range(self._size)]
        write_text_atomically(files[self._rank], text)
        deadline = time.monotonic() + limit
        while missing := [rank for rank, file in enumerate(files) if not file.exists()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {missing[0]} said nothing for {limit:.0f} s")
            time.sleep(_POLL_SECONDS)
        return [file.read_text(encoding="utf-8") for file in files]

    def agree(self, index: int, failure: _Failure | None) -> tuple[_Failure | None, bool]:
        """Return the first failure of any rank, and whether all ranks can go on together.

        A deterministic fault (a wrong shape, say) hits every rank alike, and they go on to the next case.  Where only
        some fail, others may have waited in a collective, and the process group cannot be trusted any more.
        """
        answers = self.exchange(str(index), failure.model_dump_json() if failure else "", self._limit)
        failures = {rank: _Failure.model_validate_json(text) for rank, text in enumerate(answers) if text}
        if not failures:
            return None, True
        rank, first = min(failures.items(), key=lambda item: item[1].time)
        if len(failures) == self._size and len({failure.words for failure in failures.values()}) == 1:
            return first, True
        return first.model_copy(update={"words": f"rank {rank}: {first.words}"}), False


def _count(job: VerifyJob, rank: int, size: int) -> dict[int, Peaks | None]:
    """Peaks of this rank's share of the cases, by position in the job; equal blocks are counted once."""
    from cpbench import registry
    from cpbench.parity.peaks import count_peaks

    blocks: dict[str, list[int]] = {}
    for index, item in enumerate(job.items):
        if not item.count:
            continue
        blocks.setdefault(_block_key(item.case), []).append(index)
    found: dict[int, Peaks | None] = {}
    plugins = [Path(plugin) for plugin in job.plugins]
    for turn, indices in enumerate(blocks.values()):
        if turn % size != rank:
            continue
        if rank == 0:
            _tell(job, "counting peaks", 0)
        case = job.items[indices[0]].case
        peaks = None
        try:
            peaks = count_peaks(case, registry.load(case.method, case.options, plugins))
        except Exception:
            traceback.print_exc()  # the log has it; a method that fake tensors cannot run is not wrong for that
        found |= dict.fromkeys(indices, peaks)
    return found


def _block_key(case: Case) -> str:
    """Everything that peaks depend on."""
    architecture = case.architecture.model_copy(update={"num_layers": 1})
    return case.model_copy(update={"seq_len": 1, "architecture": architecture}).model_dump_json()


def _tell(job: VerifyJob, phase: str, done: int) -> None:
    write_progress(Path(job.scratch), phase=phase, done=done, total=len(job.items), now=time.time())


def _answer(
    job: VerifyJob, index: int, item: VerifyItem, result: Verification | None, failure: _Failure | None
) -> None:
    found = result or Verification(
        method=item.case.method,
        options=item.case.options,
        shape=Shape.of(item.case),
        verdict="error",
        reason=None if failure is None else failure.words,
    )
    line = VerifyAnswer(index=index, result=found.model_copy(update={"given": item.given}))
    with (Path(job.scratch) / ANSWERS).open("a", encoding="utf-8") as file:
        file.write(line.model_dump_json() + "\n")


def main(job_file: str) -> int:
    """Run the job of this rank; return the exit code."""
    job = VerifyJob.model_validate_json(Path(job_file).read_text(encoding="utf-8"))
    return run_rank(Path(job.scratch), Path(job.log_dir), lambda: verify(job))


if __name__ == "__main__":
    leave(main(sys.argv[1]))
