"""Traces the CPU allocator through the profiler's own allocation events.

The numbers are the allocator's, byte for byte; the profiler also nests them under the operators and the recorder's
scopes.  Not in the numbers, but in the resident set: memory that libraries take from malloc directly (oneDNN, gloo),
and what the collective backend stages inside a `c10d` operator, which gloo frees on threads of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._C._profiler import _EventType, _ExtraFields_Allocation
from torch.profiler import ProfilerActivity

from cpbench.memory.timeline import Allocation, Event, Timeline
from cpbench.runtime.recorder import MARK, PREFIX, Recorder

_KERNEL = "cpbench::attention"


class CpuTrace:
    """Records from `start` to `stop`; must start before the parameters are made, so that every live byte is known."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._profile = torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def start(self) -> None:
        """Begin recording."""
        self._recorder.active = True
        self._profile.start()

    def stop(self) -> Timeline:
        """End recording and return what happened."""
        self._profile.stop()
        self._recorder.active = False
        results: Any = self._profile.profiler.kineto_results  # type: ignore[union-attr]  # set by start
        return _timeline(results.experimental_event_tree())


def _timeline(roots: list[Any]) -> Timeline:
    timeline = Timeline()
    live: dict[int, tuple[Allocation, Any]] = {}
    for node, parents in sorted(_moments(roots), key=lambda moment: moment[0].start_time_ns):
        if node.tag != _EventType.Allocation:
            label, address = node.name.removeprefix(MARK).rsplit(":", 1)
            if int(address) in live:
                live[int(address)][0].label = label
            continue
        if any(parent.name.startswith("c10d::") for parent in parents):
            continue
        fields: _ExtraFields_Allocation = node.extra_fields
        scope = tuple(p.name.removeprefix(PREFIX) for p in reversed(parents) if p.name.startswith(PREFIX))
        if fields.alloc_size > 0:
            names = [
                p.name for p in reversed(parents) if not p.name.startswith((PREFIX, "PythonDispatchMode"))
            ]
            if fields.ptr in live:
                lost = live.pop(fields.ptr)[0]
                timeline.unseen_frees += lost.bytes
                timeline.events.append(Event(lost, True, scope))
            allocation = Allocation(bytes=fields.alloc_size, scope=scope, site=" > ".join(names[-3:]))
            live[fields.ptr] = (allocation, _kernel(parents))
            timeline.events.append(Event(allocation, False, scope))
        elif fields.ptr in live:
            allocation, kernel = live.pop(fields.ptr)
            allocation.inside_kernel = kernel is not None and _kernel(parents) == kernel
            timeline.events.append(Event(allocation, True, scope))
        else:
            timeline.unmatched_frees += 1
    return timeline


def _moments(roots: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Yield every allocation event and every mark with its parents, innermost first."""
    stack: list[tuple[Any, list[Any]]] = [(root, []) for root in roots]
    while stack:
        node, parents = stack.pop()
        if node.tag == _EventType.Allocation or node.name.startswith(MARK):
            yield node, parents
            continue
        inner = [node, *parents]
        stack.extend((child, inner) for child in node.children)


def _kernel(parents: list[Any]) -> int | None:
    """Identity of the attention kernel call around an event."""
    return next((p.start_time_ns for p in parents if p.name.startswith(_KERNEL)), None)
