"""Keeps torch loaded and gives every case a fork of itself: an estimate then costs what the case costs.

    python -m cpbench.estimate_server SOCKET

SOCKET is the number of an inherited socket on which requests and answers are lines of JSON:

    {"id": 3, "module": "cpbench.worker", "job": "<job.json>", "log": "<launcher.log>"}    run `module.main(job)`
    {"id": 3, "end": true}                                                                 kill it and all its group
    {"id": 3, "code": 0}                                                  answer: exit code, or 128 + signal

Loading torch takes about two seconds, and the first estimate of a process about one more, in which torch and FSDP load
what they load late and fill their caches; so one tiny estimate runs here first.  A fork copies one thread only: whoever
waits for a lock that another one held waits for ever.  So native libraries are told to start no threads, and if one
did all the same, a case gets a process of its own, which is slower and as good.
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
from pathlib import Path
from typing import Any, NoReturn

from cpbench.worker import leave

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 0.02


class Server:
    """Forks a child for each request and tells how it ended."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._children: dict[int, int] = {}  # request by process id
        self._unread = b""

    def serve(self) -> None:
        """Work until the other end of the channel is closed; whoever supervises this process ends the children."""
        while True:
            ready, _, _ = select.select([self._channel], [], [], _POLL_SECONDS if self._children else None)
            self._reap()
            if not ready:
                continue
            received = self._channel.recv(1 << 16)
            if not received:
                return
            *lines, self._unread = (self._unread + received).split(b"\n")
            for line in lines:
                self._handle(json.loads(line))

    def _handle(self, request: dict[str, Any]) -> None:
        if "end" in request:
            for pid, number in self._children.items():
                if number == request["id"]:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(pid, signal.SIGKILL)
            return
        if not alone():
            pid = _spawn([sys.executable, "-m", request["module"], request["job"]], request["log"])
        else:
            pid = os.fork()
            if pid == 0:
                self._channel.close()
                become(request["module"], request["job"], request["log"])
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpgid(
                    pid, pid
                )  # the child does so too: whoever comes first, it can be killed from now on
        self._children[pid] = request["id"]

    def _reap(self) -> None:
        for pid in list(self._children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                answer = {"id": self._children.pop(pid), "code": code if code >= 0 else 128 - code}
                self._channel.sendall(json.dumps(answer).encode() + b"\n")


def _spawn(command: list[str], log: str) -> int:
    """Start a process in a group of its own and return its id; nobody but `_reap` waits for it."""
    output = (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    errors = (os.POSIX_SPAWN_DUP2, 1, 2)
    return os.posix_spawn(command[0], command, os.environ, file_actions=[output, errors], setpgroup=0)


def become(module: str, job: str, log: str) -> NoReturn:
    """Be the worker of a case in a process that was just forked, and end with it.

    Args:
        module: has `main(job)`, which returns an exit code.
        job: path of job.json.
        log: gets what is said before the worker has a log of its own.
    """
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # the server may be killed itself
        with contextlib.suppress(PermissionError):
            os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = importlib.import_module(module).main(job)
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
