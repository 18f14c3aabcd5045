"""Traces the CUDA caching allocator through its own history, with the scope path as each allocation's metadata.

What is alive when the trace starts is taken from the allocator's snapshot at the start; marks match by address and
time.
"""

from __future__ import annotations

from typing import Any

import torch

from cpbench.memory.timeline import Allocation, Event, Timeline
from cpbench.runtime.recorder import Mark, Recorder

_MAX_ENTRIES = 2_000_000


class CudaTrace:
    """Records from `start` to `stop` on the current device."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._before: dict[str, Any] = {}

    def start(self) -> None:
        """Begin recording."""
        self._recorder.active = True
        self._recorder.marks.clear()
        torch.cuda.memory._record_memory_history(
            "all", context="alloc", stacks="python", max_entries=_MAX_ENTRIES
        )
        self._before = torch.cuda.memory._snapshot()

    def stop(self) -> Timeline:
        """End recording and return what happened."""
        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(None)
        self._recorder.active = False
        device = torch.cuda.current_device()
        return timeline_of_snapshot(
            self._before, snapshot["device_traces"][device], self._recorder.marks, device
        )


def timeline_of_snapshot(
    before: dict[str, Any], trace: list[dict[str, Any]], marks: list[Mark], device: int = 0
) -> Timeline:
    """Return the timeline of an allocator trace.

    Args:
        before: `torch.cuda.memory._snapshot()` at the start; its live blocks come first.
        trace: the entries of one device, in order.
        marks: the recorder's marks, in order.
        device: whose segments in `before` count.
    """
    timeline = Timeline()
    live: dict[int, Allocation] = {}
    for segment in before.get("segments", ()):
        if segment.get("device", 0) != device:
            continue
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                live[block["address"]] = Allocation(bytes=block["size"], scope=(), site="before the trace")
                timeline.events.append(Event(live[block["address"]], False, ()))
    waiting = list(marks)
    for entry in trace:
        while waiting and waiting[0].time_ns // 1000 < entry["time_us"]:
            _apply(waiting.pop(0), live)
        scope = tuple(part for part in (entry.get("user_metadata") or "").split("/") if part)
        if entry["action"] == "alloc":
            allocation = Allocation(bytes=entry["size"], scope=scope, site=_site(entry.get("frames", ())))
            live[entry["addr"]] = allocation
            timeline.events.append(Event(allocation, False, scope))
        elif entry["action"] == "free_completed":
            freed = live.pop(entry["addr"], None)
            if freed is None:
                timeline.unmatched_frees += 1
            else:
                timeline.events.append(Event(freed, True, scope))
    for mark in waiting:
        _apply(mark, live)
    return timeline


def _apply(mark: Mark, live: dict[int, Allocation]) -> None:
    if mark.address in live:
        live[mark.address].label = mark.label


def _site(frames: Any) -> str:  # noqa: ANN401 - a list of dictionaries from the allocator
    """The innermost frames, file names without folders."""
    names = [
        f"{frame['filename'].rsplit('/', 1)[-1]}:{frame['line']} {frame['name']}" for frame in frames[:3]
    ]
    return " > ".join(reversed(names))
