"""Estimates asked for one by one: a few processes that keep torch loaded and answer many.

A sweep starts a process for each case, which costs seconds of imports; a search over lengths asks for dozens.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import cpbench
from cpbench.case import Case
from cpbench.launch import child_environment
from cpbench.machine import usable_cpus
from cpbench.record import Record, WorkerReport

_LOG_LINES = 15
_END_SECONDS = 5.0


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


class Estimator:
    """A context: processes are started on entry, each at its first request loads torch, and end on exit.

    `estimate` may be called from as many threads as there are processes.
    """

    def __init__(self, plugins: Sequence[Path] = (), *, processes: int | None = None) -> None:
        """Take the files of further methods, and how many processes; None: one a core."""
        self.size = processes or usable_cpus()
        self._plugins = [str(path.absolute()) for path in plugins]
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all: list[_Process] = []
        self._closing = threading.Event()

    def __enter__(self) -> Estimator:
        """Start the processes."""
        self._all = [_Process() for _ in range(self.size)]
        for process in self._all:
            self._idle.put(process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """End the processes, those that are at work too."""
        self._closing.set()
        for process in self._all:
            process.end()
            process.close()

    def estimate(self, case: Case) -> Estimate:
        """Return the estimate of a case as asked for; its mode is estimate, whatever it says."""
        case = case.model_copy(update={"mode": "estimate"})
        process = self._idle.get()
        try:
            started = datetime.now(UTC)
            request = {"case": case.model_dump(mode="json"), "plugins": self._plugins}
            answer = process.ask(request)
        finally:
            if not process.alive and not self._closing.is_set():
                process.start()  # the next case is not to blame
            self._idle.put(process)
        if "error" in answer:
            return Estimate(case=case, reason=str(answer["error"]), failed=True)
        case = Case.model_validate(answer["case"])
        if "unsupported" in answer:
            return Estimate(case=case, reason=str(answer["unsupported"]))
        facts = {
            "machine": None,
            "cpbench_version": cpbench.__version__,
            "git_commit": None,
            "method_source_hash": None,
            "started": started.isoformat(timespec="seconds"),
            "duration_seconds": (datetime.now(UTC) - started).total_seconds(),
        }
        report = WorkerReport.model_validate(answer["report"])
        return Estimate(case=case, record=Record.from_ranks(case, report, facts))


class _Process:
    """One `cpbench.estimate_worker`."""

    def __init__(self) -> None:
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - lives as long as this
        self.start()

    def start(self) -> None:
        """Start it, again if it has died."""
        self._log.seek(0)
        self._log.truncate()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "cpbench.estimate_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=child_environment("cpu", None, single_node=True),
            start_new_session=True,  # Ctrl-C is for us, and we end it
        )

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""
        return self._child.poll() is None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer; a process that dies over a request answers with an error."""
        child = self._child
        if child.stdin is None or child.stdout is None:
            raise AssertionError("both are pipes")
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
            answer = json.loads(line) if line.endswith("\n") else None
        except (OSError, ValueError):
            answer = None
        if isinstance(answer, dict):
            return answer
        self.end()
        return {"error": f"the estimating process ended with code {child.returncode}{self._last_words()}"}

    def end(self) -> None:
        """End it, whatever it does."""
        child = self._child
        if child.poll() is None:
            child.kill()
        child.wait(timeout=_END_SECONDS)
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a request that never left
                    pipe.close()

    def close(self) -> None:
        """Forget what it said."""
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.rstrip() for line in self._log.read().splitlines() if line.strip()][-_LOG_LINES:]
        return ":" + "".join(f"{os.linesep}  {line}" for line in lines) if lines else ""
