"""Turns SIGINT, SIGTERM and SIGHUP into a flag that long work asks at safe points."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """While entered, the first signal is remembered; a second one raises KeyboardInterrupt at once.

    Outside the main thread Python allows no handlers, and the flag is then never set by a signal.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that came, or None."""
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal() returned

    @property
    def came(self) -> bool:
        """Whether a signal asked for the end."""
        return self.number is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
