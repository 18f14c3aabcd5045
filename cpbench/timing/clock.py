"""Durations of the parts of a step: device events on CUDA, the monotonic clock on CPU.

Marks are taken without stopping the device; `durations` waits for it once, after the step.
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class Clock:
    """Marks moments on the compute stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Note this moment."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def durations(self) -> list[float]:
        """Return the seconds between consecutive marks and forget them; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            events, self._events = self._events, []
            return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
        times, self._times = self._times, []
        return [b - a for a, b in pairwise(times)]
