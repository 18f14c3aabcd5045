"""Estimates of cases as they are asked for, and searches that ask for one after another.

A search is a generator: it yields a case, is sent the case's `Estimate`, and returns what it has found.  `answered`
runs as many searches at a time as there is room for estimates, all in one thread: an interrupt ends it wherever it is,
and whoever holds the `PooledEstimates` then leaves them, which ends their processes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import cpbench
from cpbench.case import Case
from cpbench.errors import RunFolderError
from cpbench.estimate_pool import EstimatePool
from cpbench.launch import POLL_SECONDS, Exit, Job
from cpbench.outcome import explain, host_oom_kills
from cpbench.rank_report import CaseReport
from cpbench.record import Record
from cpbench.units import format_seconds

TIMEOUT_SECONDS = 1800.0
"""An estimate that takes longer has failed; most take seconds."""
_WORKER = ("-m", "cpbench.plan_worker")


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What came of one estimate; `record` and `reason` exclude each other."""

    case: Case
    """Resolved, if it could be."""
    record: Record | None = None
    reason: str | None = None
    """Why the case cannot run, or how its estimate failed."""
    failed: bool = False
    """The reason is a failure of the estimate and says nothing about the case."""


T = TypeVar("T")
Search = Generator[Case, Estimate, T]


class Estimates(Protocol):
    """What a search needs of `PooledEstimates`."""

    @property
    def free(self) -> int:
        """How many more cases may be started now."""
        ...

    def start(self, case: Case) -> int:
        """Start the estimate of a case and return its number; ask `free` first."""
        ...

    def wait(self) -> list[tuple[int, Estimate]]:
        """Return what has ended, by number, after a short while."""
        ...


def answered(searches: Iterable[Search[T]], estimates: Estimates) -> Iterator[tuple[int, T]]:
    """Run searches and yield what each has found, with its place among them, as they end.

    Args:
        searches: first come, first begun; one that was begun goes on before another begins.
        estimates: for this alone.
    """
    waiting = deque(enumerate(searches))
    running: dict[int, tuple[int, Search[T]]] = {}
    ended: list[tuple[int, T]] = []

    def go_on(place: int, search: Search[T], ask: Callable[[], Case]) -> None:
        try:
            case = ask()
        except StopIteration as end:
            ended.append((place, end.value))
        else:
            running[estimates.start(case)] = place, search

    while waiting or running:
        while waiting and estimates.free:
            place, search = waiting.popleft()
            go_on(place, search, partial(next, search))
        for number, estimate in estimates.wait():
            place, search = running.pop(number)
            go_on(place, search, partial(search.send, estimate))
        yield from ended
        ended.clear()


@dataclass(frozen=True, slots=True)
class _Asked:
    job: Job
    started: datetime
    kills: int
    """By the kernel's out-of-memory killer, before it."""


class PooledEstimates:
    """Estimates by a pool of processes; a context, whose end is that of the processes too."""

    def __init__(self, plugins: Sequence[Path] = (), *, pool: EstimatePool | None = None) -> None:
        """Take the files of further methods, and the pool that is to run them; None: one of its own."""
        self._plugins = tuple(path.absolute() for path in plugins)
        self._pool = pool or EstimatePool()
        self._asked: dict[int, _Asked] = {}
        self._count = 0

    def __enter__(self) -> PooledEstimates:
        """Make the folder of the files that pass between the processes, and start the first of them."""
        with _refusing_bad_disk():
            self._folder = Path(tempfile.mkdtemp(prefix="cpbench-plan-"))
            self._pool.warm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """End the processes, those that are at work too, and remove their files."""
        self._pool.__exit__(kind, error, where)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def free(self) -> int:
        """How many more cases may be started now."""
        return self._pool.free

    def start(self, case: Case) -> int:
        """Start the estimate of a case as asked for, whatever its mode; return its number."""
        self._count += 1
        folder = self._folder / str(self._count)
        job = Job(
            case=case.model_copy(update={"mode": "estimate"}),
            scratch=folder / "scratch",
            log_dir=folder / "logs",
            timeout_seconds=TIMEOUT_SECONDS,
            plugins=self._plugins,
            worker=_WORKER,
        )
        with _refusing_bad_disk():
            self._pool.start(job)
        self._asked[self._count] = _Asked(job, datetime.now(UTC), host_oom_kills())
        return self._count

    def wait(self) -> list[tuple[int, Estimate]]:
        """Return what has ended, by number, after a tenth of a second at most."""
        exits = {job.scratch: exit for job, exit in self._pool.wait(POLL_SECONDS)}
        numbers = [number for number, asked in self._asked.items() if asked.job.scratch in exits]
        return [(number, self._concluded(self._asked.pop(number), exits)) for number in numbers]

    def _concluded(self, asked: _Asked, exits: dict[Path, Exit]) -> Estimate:
        """The estimate of a case that has ended, and no file of it left."""
        try:
            return _estimate(asked, exits[asked.job.scratch])
        finally:
            shutil.rmtree(asked.job.scratch.parent, ignore_errors=True)


def _estimate(asked: _Asked, exit: Exit) -> Estimate:
    job = asked.job
    if exit.timed_out:
        return Estimate(
            case=job.case, reason=f"no result after {format_seconds(TIMEOUT_SECONDS)}", failed=True
        )
    answer = _answer(job) if exit.code == 0 else None
    if answer is None:
        outcome = explain(job, exit, oom_kills=host_oom_kills() - asked.kills)
        return Estimate(case=job.case, reason=outcome.reason, failed=True)
    if answer.report is None:
        return Estimate(case=answer.case, reason=answer.unsupported)
    facts = {
        "machine": None,
        "cpbench_version": cpbench.__version__,
        "git_commit": None,
        "method_source_hash": None,
        "started": asked.started.isoformat(timespec="seconds"),
        "duration_seconds": exit.duration_seconds,
    }
    return Estimate(case=answer.case, record=Record.from_ranks(answer.case, answer.report, facts))


def _answer(job: Job) -> CaseReport | None:
    """What the worker wrote; None if that is not there or not whole."""
    try:
        return CaseReport.model_validate_json((job.folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def _refusing_bad_disk() -> Iterator[None]:
    """Raise RunFolderError for an OSError inside the block."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"temporary files cannot be written in {tempfile.gettempdir()} ({error.strerror}); "
            "name another folder in the environment variable TMPDIR"
        ) from error
