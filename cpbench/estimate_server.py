"""Keeps torch loaded and lets forks of itself run the cases: an estimate then costs what the case costs.

    python -m cpbench.estimate_server SOCKET

SOCKET is the number of an inherited socket on which requests and answers are lines of JSON:

    {"id": 3, "module": "cpbench.worker", "job": "<job.json>", "log": "<launcher.log>"}    run `module.main(job)`
    {"id": 3, "end": true}                                                                 kill it and all its group
    {"id": 3, "code": 0}                                                  answer: exit code, or 128 + signal

Loading torch takes about two seconds, and the first estimate of a process about one more, in which torch and FSDP load
what they load late and fill their caches; so one tiny estimate runs here first.  A child whose case went well takes the
next one: it has its memory and its caches by then, which saves a tenth of a case's time.  One whose case failed ends
with it, as does one that has run many.

A fork copies one thread only: whoever waits for a lock that another one held waits for ever.  So native libraries are
told to start no threads, and if one did all the same, a case gets a process of its own, which is slower and as good.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cpbench.worker import leave

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 0.02
_MOST_CASES = 100
"""Of one child: what it holds grows by a megabyte a case."""
_DONE = b"."
"""What a child says when its case went well."""


@dataclass(slots=True, eq=False)
class _Child:
    pid: int
    channel: socket.socket | None
    """On which it takes jobs; None of a process for one case."""
    request: int | None = None
    """What it works on."""
    cases: int = 0

    def give(self, request: dict[str, Any]) -> bool:
        """Hand it a job; False if it is gone."""
        assert self.channel is not None
        job = {name: request[name] for name in ("module", "job", "log")}
        try:
            self.channel.sendall(json.dumps(job).encode() + b"\n")
        except OSError:
            return False
        self.request, self.cases = request["id"], self.cases + 1
        return True

    def said_done(self) -> bool:
        """Whether it has said so since it was asked last."""
        if self.channel is None:
            return False
        try:
            return self.channel.recv(1, socket.MSG_DONTWAIT) == _DONE
        except OSError:  # nothing to read, or gone
            return False


class Server:
    """Gives each request to a child, forks one if none is free, and tells how it ended."""

    def __init__(self, channel: socket.socket, *, most_cases: int = _MOST_CASES) -> None:
        """Take the channel of requests and answers, and how many cases a child may run."""
        self._channel = channel
        self._most_cases = most_cases
        self._children: list[_Child] = []
        self._unread = b""

    def serve(self) -> None:
        """Work until the other end of the channel is closed; whoever supervises this process ends the children."""
        while True:
            busy = [child for child in self._children if child.request is not None]
            heard = [self._channel, *(child.channel for child in busy if child.channel is not None)]
            ready, _, _ = select.select(heard, [], [], _POLL_SECONDS if busy else None)
            self._look_after(busy)
            if self._channel not in ready:
                continue
            received = self._channel.recv(1 << 16)
            if not received:
                return
            *lines, self._unread = (self._unread + received).split(b"\n")
            for line in lines:
                self._handle(json.loads(line))

    def _handle(self, request: dict[str, Any]) -> None:
        if "end" in request:
            for child in self._children:
                if child.request == request["id"]:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(child.pid, signal.SIGKILL)
            return
        for child in [child for child in self._children if child.request is None]:
            if child.cases < self._most_cases and child.give(request):
                return
            self._forget(child)
        if alone():
            child = self._fork()
            child.give(request)  # should it be gone already, `_look_after` says so
            child.request = request["id"]
        else:
            pid = _spawn([sys.executable, "-m", request["module"], request["job"]], request["log"])
            child = _Child(pid, None, request["id"])
        self._children.append(child)

    def _fork(self) -> _Child:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            for channel in (ours, self._channel, *(child.channel for child in self._children)):
                if channel is not None:
                    channel.close()
            work(theirs)
        theirs.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)  # the child does so too: whoever comes first, it can be killed from now on
        return _Child(pid, ours)

    def _look_after(self, busy: list[_Child]) -> None:
        """Tell which cases have ended, well or with their child."""
        for child in busy:
            ended, status = os.waitpid(child.pid, os.WNOHANG)
            if child.said_done():
                self._answer(child, 0)
            elif ended:
                code = os.waitstatus_to_exitcode(status)
                self._answer(child, code if code >= 0 else 128 - code)
            if ended:
                self._children.remove(child)

    def _answer(self, child: _Child, code: int) -> None:
        answer = {"id": child.request, "code": code}
        child.request = None
        self._channel.sendall(json.dumps(answer).encode() + b"\n")

    def _forget(self, child: _Child) -> None:
        """Let an idle child go, which ends when its channel does."""
        self._children.remove(child)
        if child.channel is not None:
            child.channel.close()
        os.waitpid(child.pid, 0)


def _spawn(command: list[str], log: str) -> int:
    """Start a process in a group of its own and return its id; nobody but `_reap` waits for it."""
    output = (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    errors = (os.POSIX_SPAWN_DUP2, 1, 2)
    return os.posix_spawn(command[0], command, os.environ, file_actions=[output, errors], setpgroup=0)


def work(channel: socket.socket) -> NoReturn:
    """Be a worker, in a process that was just forked: run the jobs that come until one fails or no more come.

    Args:
        channel: gets jobs as lines of JSON: `module` has `main(job)`, which returns an exit code; `log` gets what is
            said before the worker has a log of its own.
    """
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # the server may be killed itself
        with contextlib.suppress(PermissionError):
            os.setpgid(0, 0)
        with channel.makefile("rb") as jobs:
            for line in jobs:
                job = json.loads(line)
                output = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.close(output)
                code = importlib.import_module(job["module"]).main(job["job"])
                if code:
                    break
                sys.stdout.flush()
                sys.stderr.flush()
                channel.sendall(_DONE)
    except BaseException:
        traceback.print_exc()
    leave(code)


def alone() -> bool:
    """Return whether this process has a single thread, so that a fork of it is whole."""
    return len(list(Path("/proc/self/task").iterdir())) == 1


def warm() -> None:
    """Load all that an estimate loads, by making a small one.

    Its failure is no one's problem: the same would happen to a case, which then says so.
    """
    import torch

    from cpbench import registry
    from cpbench.case import Case
    from cpbench.model_config import PRESETS
    from cpbench.resolve import resolve
    from cpbench.world.estimate import estimate_case

    torch.set_num_threads(1)  # none is started then
    importlib.import_module("cpbench.world.run")  # what a worker imports
    case = Case(
        method="ulysses",
        model="tiny",
        architecture=PRESETS["tiny"],
        seq_len=4096,
        world_size=2,
        mode="estimate",
        device="cuda",
        hardware="h100-80g",
    )
    try:
        resolved, _ = resolve(case, [])
        estimate_case(resolved, registry.load(resolved.method, resolved.options))
    except Exception:
        traceback.print_exc()


def main(descriptor: int) -> int:
    """Serve on an inherited socket; return the exit code."""
    channel = socket.socket(fileno=descriptor)
    began = time.monotonic()
    warm()
    print(f"warm after {time.monotonic() - began:.1f} s", flush=True)  # noqa: T201 - to the server's log
    gc.collect()
    gc.freeze()  # what is here now is shared by all children: a collection in one would copy it
    Server(channel).serve()
    return 0


if __name__ == "__main__":
    leave(main(int(sys.argv[1])))
