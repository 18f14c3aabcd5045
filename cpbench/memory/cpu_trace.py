"""Traces the CPU allocator through the profiler's own allocation events.

The numbers are the allocator's, byte for byte; the profiler also nests them under the operators and the recorder's
scopes.  Not in the numbers, but in the resident set: memory that libraries take from malloc directly (oneDNN, gloo),
and what the collective backend stages inside a `c10d` operator, which gloo frees on threads of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
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
        # acc_events: one cycle is all there is, and torch 2.11 warns of the next one otherwise.
        self._profile = torch.profiler.profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )

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


@dataclass(frozen=True, slots=True)
class _Where:
    """What is around an event."""

    scope: tuple[str, ...] = ()
    """The recorder's scopes, outermost first."""
    operators: tuple[str, ...] = ()
    """The innermost three."""
    kernel: int | None = None
    """Identity of the attention kernel call."""
    staged: bool = False
    """Inside a `c10d` operator."""

    def inside(self, node: Any) -> _Where:  # noqa: ANN401 - an event of the profiler's tree
        """Return what is around the children of a node."""
        name: str = node.name
        if name.startswith(PREFIX):
            return _Where((*self.scope, name[len(PREFIX) :]), self.operators, self.kernel, self.staged)
        if name.startswith("PythonDispatchMode"):
            return self
        kernel = node.start_time_ns if name.startswith(_KERNEL) else self.kernel
        staged = self.staged or name.startswith("c10d::")
        return _Where(self.scope, (*self.operators[-2:], name), kernel, staged)


def _timeline(roots: list[Any]) -> Timeline:
    timeline = Timeline()
    live: dict[int, tuple[Allocation, int | None]] = {}
    for _, node, where in sorted(_moments(roots), key=itemgetter(0)):
        if node.tag != _EventType.Allocation:
            label, address = node.name.removeprefix(MARK).rsplit(":", 1)
            if int(address) in live:
                live[int(address)][0].label = label
            continue
        if where.staged:
            continue
        fields: _ExtraFields_Allocation = node.extra_fields
        pointer, size = fields.ptr, fields.alloc_size
        if size > 0:
            if pointer in live:
                lost = live.pop(pointer)[0]
                timeline.unseen_frees += lost.bytes
                timeline.events.append(Event(lost, True, where.scope))
            allocation = Allocation(bytes=size, scope=where.scope, site=" > ".join(where.operators))
            live[pointer] = (allocation, where.kernel)
            timeline.events.append(Event(allocation, False, where.scope))
        elif pointer in live:
            allocation, kernel = live.pop(pointer)
            allocation.inside_kernel = kernel is not None and where.kernel == kernel
            timeline.events.append(Event(allocation, True, where.scope))
        else:
            timeline.unmatched_frees += 1
    return timeline


def _moments(roots: list[Any]) -> Iterator[tuple[int, Any, _Where]]:
    """Yield every allocation event and every mark with its time and what is around it."""
    stack: list[tuple[Any, _Where]] = [(root, _Where()) for root in roots]
    while stack:
        node, where = stack.pop()
        if node.tag == _EventType.Allocation or node.name.startswith(MARK):
            yield node.start_time_ns, node, where
        elif children := node.children:
            inner = where.inside(node)
            stack.extend([(child, inner) for child in children])
