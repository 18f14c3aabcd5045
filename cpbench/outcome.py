"""Says what an ended launch means: the status of the case, the reason in words, the last lines of the log."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

from pydantic import BaseModel, ValidationError

from cpbench.durations import longer_timeout
from cpbench.launch import Exit, Job, read_progress
from cpbench.record import RankFailure, Status, WorkerReport
from cpbench.units import format_seconds

_LOG_LINES = 6
_LINE_CHARACTERS = 240
# torchrun's summary of a failure, and the processes that it ended itself because of another one's failure.
_FAILED_RANK = re.compile(r"\brank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+) \(pid: (\d+)\)")
_ENDED_BY_TORCHRUN = re.compile(r"Sending process (\d+) closing signal")
_TORCHRUN = re.compile(r"^[EWI]\d{4} .*torch/distributed/elastic", re.MULTILINE)
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# A traceback's frames say where, not what; its last line stays.
_FRAME = re.compile(r"^(?:\[rank\d+\]:)?\s*(?:Traceback \(most|File \"|[~^]+\s*$)|^(?:\[rank\d+\]:)?\s{4,}\S")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a launch; `report` is set exactly when status is ok."""

    status: Status
    reason: str | None = None
    report: WorkerReport | None = None


def explain(job: Job, exit: Exit, *, oom_kills: int) -> Outcome:
    """Return the outcome of an ended launch.

    Args:
        job: what was launched.
        exit: how it ended.
        oom_kills: kills by the kernel's out-of-memory killer while it ran, see `host_oom_kills`.
    """
    problem = ""
    if exit.code == 0:
        report = _load(WorkerReport, job.folder / "report.json")
        if isinstance(report, WorkerReport):
            return Outcome(status="ok", report=report)
        problem = f"the worker ended without error but its report {report}"
    failures = sorted(_failures(job.scratch), key=lambda failure: failure.time)
    # A rank that knows its cause comes first; a rank that lost its peers says only `error`, after the fact.
    informed = [failure for failure in failures if failure.status != "error"]
    if informed:
        return _from_failure(job, informed[0])
    if exit.timed_out:
        return Outcome(status="timeout", reason=_with_log(job, None, _timeout_reason(job)))
    ended = _failed_ranks(job.launcher_log)
    for rank, code in ended:
        if code < 0:
            return _from_signal(job, rank, -code, oom_kills)
    if not job.by_torchrun and exit.code > 128:
        return _from_signal(job, 0, exit.code - 128, oom_kills)
    if failures:
        return _from_failure(job, failures[0])
    for rank, code in ended:
        return Outcome(status="error", reason=_with_log(job, rank, f"rank {rank} ended with code {code}"))
    words = problem or f"{'torchrun' if job.by_torchrun else 'the worker'} ended with code {exit.code}"
    return Outcome(status="error", reason=_with_log(job, None, words))


def host_oom_kills() -> int:
    """Return how often the kernel's out-of-memory killer has struck this container, or this machine."""
    for file, key in ((_cgroup_file(), "oom_kill"), (Path("/proc/vmstat"), "oom_kill")):
        try:
            lines = file.read_text(encoding="ascii").splitlines() if file else []
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == key and value.strip().isdigit():
                return int(value)
    return 0


def _cgroup_file() -> Path | None:
    """The kernel's event counters of this process's memory cgroup, version 2 or 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    mount = Path("/sys/fs/cgroup")
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            candidates = [mount / path.lstrip("/") / "memory.events", mount / "memory.events"]
        elif "memory" in controllers.split(","):
            candidates = [mount / "memory" / path.lstrip("/") / "memory.oom_control"]
            candidates.append(mount / "memory" / "memory.oom_control")
        else:
            continue
        for file in candidates:
            if file.is_file():
                return file
    return None


def _from_failure(job: Job, failure: RankFailure) -> Outcome:
    words = f"rank {failure.rank}: {failure.reason}"
    status: Status = "error" if failure.status == "ok" else failure.status
    return Outcome(status=status, reason=_with_log(job, failure.rank, words))


def _from_signal(job: Job, rank: int, number: int, oom_kills: int) -> Outcome:
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    if number == signal.SIGKILL and oom_kills > 0:
        words = f"rank {rank} was killed by the kernel because host memory ran out"
        return Outcome(status="oom_host", reason=_with_log(job, rank, words))
    words = f"rank {rank} was killed by signal {number} ({name})"
    if number == signal.SIGBUS:
        words += "; /dev/shm or the disk may be full"
    return Outcome(status="error", reason=_with_log(job, rank, words))


def _timeout_reason(job: Job) -> str:
    progress = read_progress(job)
    where = (
        f", in {progress.phase} {progress.done}/{progress.total}" if progress else ", before its first step"
    )
    longer = progress and longer_timeout(job.timeout_seconds, progress.done, progress.total)
    more = f"--timeout, at this pace about --timeout {longer}" if longer else "--timeout"
    return f"no result after {format_seconds(job.timeout_seconds)}{where}; allow more with {more}"


def _failures(scratch: Path) -> list[RankFailure]:
    loaded = [_load(RankFailure, file) for file in sorted(scratch.glob("node*/failure-rank*.json"))]
    return [failure for failure in loaded if isinstance(failure, RankFailure)]


def _load(model: type[BaseModel], path: Path) -> BaseModel | str:
    """The validated file, or what is wrong with it."""
    try:
        return model.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError, ValidationError) as error:
        return f"cannot be read: {str(error).splitlines()[0]}"


def _failed_ranks(launcher_log: Path) -> list[tuple[int, int]]:
    """(rank, exit code or -signal) of each rank that ended badly and not by torchrun's hand."""
    text = _read(launcher_log)
    ended = set(_ENDED_BY_TORCHRUN.findall(text))
    return [(int(rank), int(code)) for rank, code, pid in _FAILED_RANK.findall(text) if pid not in ended]


def _with_log(job: Job, rank: int | None, words: str) -> str:
    """`words`, then the last telling lines of the rank's log, or of the first log that has any."""
    ranks = [rank] if rank is not None else list(range(job.case.world_size))
    for file in [*(job.log_dir / f"rank{k}.log" for k in ranks), job.launcher_log]:
        lines = _telling_lines(_read(file))
        if lines:
            return "\n".join([words, f"last lines of {file.name}:", *(f"  {line}" for line in lines)])
    return words


def _telling_lines(text: str) -> list[str]:
    # What torchrun adds after a failure is said better by the reason.
    lines = [_ANSI.sub("", line).rstrip() for line in _TORCHRUN.split(text, maxsplit=1)[0].splitlines()]
    if crash := _crash(lines):
        return [line[:_LINE_CHARACTERS] for line in crash]
    kept = [line for line in lines if line.strip() and not _FRAME.match(line)]
    return [line[:_LINE_CHARACTERS] for line in kept[-_LOG_LINES:]]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _crash(lines: Sequence[str]) -> list[str]:
    """What faulthandler wrote: the kind of a crash in native code, and the innermost calls of the program's thread.

    A rank that was ended, as after a time-out, has the calls alone.
    """
    fatal = [line for line in lines if line.startswith("Fatal Python error:")][:1]
    thread = next((i for i, line in enumerate(lines) if line.startswith("Current thread")), None)
    if thread is None:
        return fatal
    innermost = takewhile(lambda line: line.startswith("  File "), lines[thread + 1 :])
    return [*fatal, *islice((line.strip() for line in innermost), _LOG_LINES - 1)]
