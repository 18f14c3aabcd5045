"""Traces the CUDA caching allocator through its own history, with the scope path as each allocation's metadata.

What is alive when the trace starts is taken from the allocator's snapshot at the start; marks match by address and
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cpbench.memory.frames import site
from cpbench.memory.timeline import Allocation, Event, Timeline
from cpbench.runtime.recorder import Mark, Moment, Recorder

_MAX_ENTRIES = 2_000_000
_KERNELS = "/runtime/kernels.py"
_NEAR_US = 50
"""The allocator's clock and the recorder's may differ by as much."""


class CudaTrace:
    """Records from `start` to `stop` on the current device."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._before: dict[str, Any] = {}
        self._workspaces: frozenset[int] = frozenset()

    def start(self) -> None:
        """Begin recording; what matrix products keep is made first, so that no part of the step is charged with it."""
        self._workspaces = _make_workspaces()
        self._recorder.active = True
        self._recorder.marks.clear()
        self._recorder.moments.clear()
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
            self._before,
            snapshot["device_traces"][device],
            self._recorder.marks,
            device,
            moments=self._recorder.moments,
            workspaces=self._workspaces,
        )


def timeline_of_snapshot(
    before: dict[str, Any],
    trace: list[dict[str, Any]],
    marks: list[Mark],
    device: int = 0,
    *,
    moments: Sequence[Moment] = (),
    workspaces: frozenset[int] = frozenset(),
) -> Timeline:
    """Return the timeline of an allocator trace.

    Args:
        before: `torch.cuda.memory._snapshot()` at the start; its live blocks come first.
        trace: the entries of one device, in order.
        marks: the recorder's marks, in order.
        device: whose segments in `before` count.
        moments: the recorder's changes of scope, in order.
        workspaces: addresses of blocks in `before` that the library of matrix products keeps.
    """
    timeline = Timeline()
    live: dict[int, Allocation] = {}
    for address, size in _active(before, device):
        label = "workspace" if address in workspaces else None
        live[address] = Allocation(bytes=size, scope=(), site="before the trace", label=label)
        timeline.events.append(Event(live[address], False, ()))
    waiting = list(marks)
    scopes = _Scopes(moments)
    in_kernel: dict[int, Allocation] = {}
    """What a kernel call has allocated since it began."""
    for entry in trace:
        while waiting and waiting[0].time_ns // 1000 < entry["time_us"]:
            _apply(waiting.pop(0), live)
        address = entry["addr"]
        if entry["action"] == "alloc":
            scope = scopes.of(entry)
            frames = [(f["filename"], f["line"], f["name"]) for f in entry.get("frames", ())]
            allocation = Allocation(bytes=entry["size"], scope=scope, site=site(frames))
            if any(file.endswith(_KERNELS) for file, _, _ in frames):
                in_kernel[address] = allocation
            else:
                in_kernel.clear()  # something else runs: what is left of the kernel are its results
            live[address] = allocation
            timeline.events.append(Event(allocation, False, scope))
        elif entry["action"] == "free_completed":
            freed = live.pop(address, None)
            if freed is None:
                timeline.unmatched_frees += 1
                continue
            freed.inside_kernel = in_kernel.pop(address, None) is freed
            timeline.events.append(Event(freed, True, scopes.of(entry)))
    for mark in waiting:
        _apply(mark, live)
    return timeline


class _Scopes:
    """The scopes of allocator entries, asked for in the order of time.

    The allocator keeps one path for each thread.  That of autograd's thread is still of its last step when it begins
    the next, and empty before its first; then the path that the program had at that time counts.
    """

    def __init__(self, moments: Sequence[Moment]) -> None:
        self._moments = moments
        self._next = 0

    def of(self, entry: dict[str, Any]) -> tuple[str, ...]:
        """Return the scopes open at an entry, outermost first."""
        time, path = entry["time_us"], entry.get("user_metadata") or ""
        moments = self._moments
        while self._next < len(moments) and moments[self._next].time_ns // 1000 <= time:
            self._next += 1
        if moments and path not in self._near(time):
            path = moments[self._next - 1].path if self._next else ""
        return tuple(part for part in path.split("/") if part)

    def _near(self, time: int) -> Iterator[str]:
        """Paths that may have been open at a time."""
        position = self._next
        while position < len(self._moments) and self._moments[position].time_ns // 1000 <= time + _NEAR_US:
            yield self._moments[position].path
            position += 1
        position = self._next - 1
        while position >= 0:
            yield self._moments[position].path
            if self._moments[position].time_ns // 1000 < time - _NEAR_US:
                return
            position -= 1


def _active(snapshot: dict[str, Any], device: int) -> Iterator[tuple[int, int]]:
    """Address and size of each block in use."""
    for segment in snapshot.get("segments", ()):
        if segment.get("device", 0) == device:
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    yield block["address"], block["size"]


def _make_workspaces() -> frozenset[int]:
    """Run a matrix product and its backward, and return the addresses of what they leave allocated.

    cuBLAS has a workspace for each thread and stream, and autograd runs backward on a thread of its own.
    """
    device = torch.cuda.current_device()
    known = {address for address, _ in _active(torch.cuda.memory._snapshot(), device)}
    x = torch.ones(8, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
    (x @ x).sum().backward()
    del x
    torch.cuda.synchronize()
    return frozenset(a for a, _ in _active(torch.cuda.memory._snapshot(), device) if a not in known)


def _apply(mark: Mark, live: dict[int, Allocation]) -> None:
    if mark.address in live:
        live[mark.address].label = mark.label
