"""Runs estimates several at a time, in forks of one warm process: the orchestrator's side of `cpbench.estimate_server`.

A job goes in and an `Exit` comes out, as of `cpbench.launch.launch`, with the same files beside it.  The server and all
its children are descendants of one supervisor, which ends them when the pool is left or this process is gone.  Should
the server itself die, or no longer answer, the cases that ran in it have ended badly, and the next one gets a new
server.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO

import psutil

from cpbench.launch import WORKER, Exit, Job, child_environment, end_supervised, prepare
from cpbench.machine import usable_cpus
from cpbench.units import GIB

CASE_BYTES = GIB
"""Memory to have for each estimate that runs at the same time; most need less than half of it."""
SERVER = ("-m", "cpbench.estimate_server")
_PATIENCE_SECONDS = 30.0
"""How long a server may take to end a case that is over its time."""
# OMP_NUM_THREADS stays the user's: what a rank of a CPU case allocates depends on it.
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def room() -> int:
    """Return how many estimates may run at a time: one a core, with memory for each."""
    return max(1, min(usable_cpus(), psutil.virtual_memory().available // CASE_BYTES))


def suits(job: Job) -> bool:
    """Return whether a job is one that a server can run: one process, by a module of cpbench."""
    return job.case.mode == "estimate" and job.nodes.count == 1 and tuple(job.worker[:1]) == WORKER[:1]


@dataclass(slots=True)
class _Running:
    job: Job
    number: int
    began: float
    timed_out: bool = False


@dataclass(slots=True)
class EstimatePool:
    """Estimates that run at the same time; while entered.

    A server is started with the first job, or at once with `warm`.
    """

    size: int = field(default_factory=room)
    """Estimates at a time."""
    server: Sequence[str] = SERVER
    """What the server runs, in Python's words: `-m module` or a script; it gets the number of its socket."""
    _process: subprocess.Popen[bytes] | None = None
    _channel: socket.socket | None = None
    _log: IO[bytes] | None = None
    """Without a name, so that nothing is left of it however this process ends."""
    _unread: bytes = b""
    _count: int = 0
    _running: dict[int, _Running] = field(default_factory=dict)

    def __enter__(self) -> EstimatePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._running.clear()

    @property
    def warmed(self) -> bool:
        """Whether its server was started, so that a single job goes there sooner than to a process of its own."""
        return self._process is not None

    @property
    def free(self) -> int:
        """How many more jobs may be started now."""
        return self.size - len(self._running)

    @property
    def jobs(self) -> Sequence[tuple[Job, float]]:
        """Each running job with its age in seconds, oldest first."""
        now = time.monotonic()
        return [(running.job, now - running.began) for running in self._running.values()]

    def warm(self) -> None:
        """Start the server, if there is none: it takes some seconds to be ready."""
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        command = [sys.executable, "-m", "cpbench.supervise", sys.executable, *self.server]
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.PIPE,  # the supervisor's lifeline
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                env=child_environment(None, single_node=True) | dict.fromkeys(_ONE_THREAD, "1"),
                start_new_session=True,
            )
        self._channel, self._log, self._unread = ours, log, b""

    def start(self, job: Job) -> None:
        """Start a job; ask `free` first.

        Raises:
            OSError: its folders cannot be written.
        """
        job_file = prepare(job)
        job.launcher_log.touch()
        self._count += 1
        self._running[self._count] = _Running(job, self._count, time.monotonic())
        request = {"module": job.worker[1], "job": str(job_file), "log": str(job.launcher_log)}
        self.warm()
        self._send({"id": self._count, **request})

    def wait(self, seconds: float) -> list[tuple[Job, Exit]]:
        """Return the jobs that have ended, after at most so many seconds; those over their time are ended."""
        now = time.monotonic()
        hung = False
        for running in self._running.values():
            over = now - running.began - running.job.timeout_seconds
            if not running.timed_out and over > 0:
                running.timed_out = True
                self._send({"id": running.number, "end": True})
            hung = hung or over > _PATIENCE_SECONDS
        codes = self._lost() if hung else self._received(seconds)
        return [self._ended(number, code) for number, code in codes.items() if number in self._running]

    def _ended(self, number: int, code: int) -> tuple[Job, Exit]:
        running = self._running.pop(number)
        return running.job, Exit(
            code=code,
            timed_out=running.timed_out and code != 0,
            interrupted=False,
            duration_seconds=time.monotonic() - running.began,
        )

    def _received(self, seconds: float) -> dict[int, int]:
        """Exit codes by number; of everything that ran if the server is gone."""
        if self._channel is None:
            return self._lost()
        self._channel.settimeout(seconds)
        try:
            received = self._channel.recv(1 << 16)
        except TimeoutError:
            return {}
        except OSError:
            received = b""
        *lines, self._unread = (self._unread + received).split(b"\n")
        codes = {answer["id"]: answer["code"] for answer in map(json.loads, lines)}
        if not received:
            codes = self._lost() | codes
        return codes

    def _lost(self) -> dict[int, int]:
        """End the server and say in the logs of its cases that it is gone; the exit code of each is the server's."""
        code, words = self._end()
        for running in self._running.values():
            with running.job.launcher_log.open("a", encoding="utf-8") as log:
                log.write(f"{words}\nthe process that this estimate was forked from ended with code {code}\n")
        return dict.fromkeys(self._running, code or 1)

    def _send(self, request: dict[str, object]) -> None:
        if self._channel is None:
            return
        self._channel.settimeout(None)
        try:
            self._channel.sendall(json.dumps(request).encode() + b"\n")
        except OSError:  # the server is gone, which `wait` finds out too
            return

    def _end(self) -> tuple[int, str]:
        """End the server and everything under it; return its exit code and its last words."""
        code, words = 0, ""
        if self._process is not None:
            code = end_supervised(self._process)
        if self._channel is not None:
            self._channel.close()
        if self._log is not None:
            self._log.seek(0)
            words = self._log.read().decode(errors="replace")[-4000:]
            self._log.close()
        self._process, self._channel, self._log = None, None, None
        return code, words


__all__ = ["CASE_BYTES", "SERVER", "EstimatePool", "room", "suits"]
