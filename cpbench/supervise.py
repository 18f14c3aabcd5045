"""Runs one command and lets no descendant outlive it, or the process that asked for it.

`python -m cpbench.supervise COMMAND...` is the leader of a case's session.  Its standard input is a pipe
whose other end the sweep holds: end of file means that the sweep is gone, even by SIGKILL, which no handler
could catch.  torchrun puts every worker in a session of its own, so killing a process group is not enough;
this process is the subreaper of all its descendants instead, so they can always be enumerated, orphans too.

Exit code: the command's, or 128 + signal; 143 when it was told to stop or its parent went away.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
STOPPED = 128 + signal.SIGTERM


def main(command: list[str]) -> int:
    """Run `command` to its end and return its exit code; see the module docstring."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    stop = _StopFlag()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop.set)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        close_fds=False,  # what this process was given on purpose is for the command
        # Should this process be killed itself, torchrun hears of it and ends its workers.
        preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509 - single-threaded here
    )
    try:
        code = _wait(child, stop)
    finally:
        _end_descendants()
    return code


class _StopFlag:
    """Remembers that a signal asked for the end."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True


def _wait(child: subprocess.Popen[bytes], stop: _StopFlag) -> int:
    lifeline = sys.stdin.fileno()
    while not stop.is_set:
        code = _reap(child.pid)
        if code is not None:
            return code if code >= 0 else 128 - code
        ready, _, _ = select.select([lifeline], [], [], _POLL_SECONDS)
        if ready and not os.read(lifeline, 4096):
            break
    return STOPPED


def _reap(pid: int) -> int | None:
    """Collect every descendant that has ended; return the exit code of `pid` if it is among them."""
    code = None
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if ended == 0:
            return code
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)


def _end_descendants() -> None:
    """SIGTERM to all, SIGKILL after the grace; repeated because a dying process may still fork."""
    deadline = time.monotonic() + GRACE_SECONDS
    number = signal.SIGTERM
    asked: set[int] = set()
    while True:
        _reap(-1)
        alive = psutil.Process().children(recursive=True)
        if not alive:
            return
        if number == signal.SIGTERM and time.monotonic() > deadline:
            number, asked = signal.SIGKILL, set()
        for process in alive:
            if process.pid not in asked:
                asked.add(process.pid)
                _send(process, number)
        time.sleep(0.05)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
        if number == signal.SIGTERM:
            process.send_signal(signal.SIGCONT)  # a stopped process would keep the signal pending
    except psutil.Error:
        pass


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
