"""What `cpbench verify` shows while it works, on standard error: a live line in a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.status import Status
from rich.text import Text

from cpbench.errors import without_name
from cpbench.units import format_seconds
from cpbench.verification import Verification, title

_QUIET_SECONDS = 10.0  # a pipe gets a line of progress at most so often


class VerifyDisplay:
    """Counts what is done and prints what failed at once."""

    def __init__(self, console: Console) -> None:
        """Show on a console; it decides between the live line and plain ones."""
        self._console = console
        self._status = Status("", console=console) if console.is_terminal else None
        self._begin = time.monotonic()
        self._said = self._begin
        self._total = self._done = 0
        self._phase = ""

    def __enter__(self) -> VerifyDisplay:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def started(self, total: int, unsupported: int) -> None:
        """So many cases are going to be checked."""
        self._total = total
        words = f"{total} combinations of method, options and shape"
        self._print(words + (f"; {unsupported} more are unsupported" if unsupported else ""))

    def running(self, phase: str) -> None:
        """What runs now."""
        now = time.monotonic()
        new, self._phase = phase != self._phase, phase
        if self._status is not None:
            self._status.update(Text(self._line(now)))
        elif new and now - self._said >= _QUIET_SECONDS:
            self._said = now
            self._print(self._line(now))

    def finished(self, result: Verification) -> None:
        """A case has its findings; what is wrong is printed at once."""
        self._done += 1
        if result.verdict in ("fail", "error"):
            name = title(result.method, result.given)
            reason = without_name(result.reason or "", result.method)
            self._print(f"{result.verdict}: {name} at {result.shape.title}: {reason}")

    def _line(self, now: float) -> str:
        return f"[{self._done}/{self._total}] {self._phase} ({format_seconds(now - self._begin)})"

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


def make_display(console: Console) -> VerifyDisplay:
    """Return a display on a console."""
    return VerifyDisplay(console)
