"""What ran in one recorded block, operator by operator, and its drawing in slots.

An operator that only makes or views a tensor takes no slot; small ones share that of the GEMM beside them, and those
of one tile loop share one.  What runs beside compute (an exchange that is waited for later, a copy on a side stream)
takes no slot of its own, unless nothing was computed meanwhile.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Literal

from cpbench.block_schedule import Bar, Kind, Lane, Phase, PhaseName
from cpbench.memory.timeline import Event, Timeline

OUTSIDE = frozenset({"x", "y", "dx", "dy", "weights", "weight gradients", "host"})
"""Names that a block's peak leaves out: given to it, returned by it, or of a weight's size."""
_OP = "op:"
_COPY = 0.5  # slots that a copy beside compute is drawn with


StreamLane = Literal["copy_out", "copy_in"]


@dataclass(slots=True, eq=False)
class Operation:
    """Something that takes time."""

    lane: Lane
    kind: Kind
    name: str
    index: int
    """Of the operator at which it started."""
    done: int | None = None
    """Of the first operator after it was waited for; None: complete when it returned."""
    loop: int = 0
    """The call of a tile loop that it belongs to; 0: of none."""


@dataclass(slots=True)
class BlockLog:
    """Everything that one run leaves behind."""

    operations: list[Operation] = field(default_factory=list)
    count: int = 0
    """Operators so far."""
    phases: dict[PhaseName, int] = field(default_factory=dict)
    """The first operator of each phase."""
    host: list[tuple[int, int]] = field(default_factory=list)
    """(operator, bytes taken or given back) of host memory."""
    stream: StreamLane | None = None
    """The side stream in use."""

    def add(self, lane: Lane, kind: Kind, name: str, loop: int = 0) -> Operation:
        """Note an operation that starts now."""
        operation = Operation(lane, kind, name, self.count, loop=loop)
        self.operations.append(operation)
        return operation


@dataclass(frozen=True, slots=True)
class Drawing:
    """A run in slots."""

    bars: tuple[Bar, ...]
    phases: tuple[Phase, ...]
    alive: dict[str, tuple[int, ...]]
    host: tuple[int, ...]

    def peak(self, phase: PhaseName) -> int:
        """Highest sum of what is alive in a phase."""
        totals = [sum(column) for column in zip(*self.alive.values(), strict=True)]
        return max((max(totals[p.start : p.stop]) for p in self.phases if p.name == phase), default=0)


def slots(log: BlockLog, timeline: Timeline) -> Drawing:
    """Return a run in slots."""
    made = _Slots(log)
    begins = sorted(log.phases.items(), key=lambda item: item[1])
    firsts = [made.slot(index) for _, index in begins]
    ends = [*firsts[1:], made.count]
    phases = [
        Phase(name=name, start=start, stop=stop)
        for (name, _), start, stop in zip(begins, firsts, ends, strict=True)
    ]
    alive = _alive(timeline, made)
    return Drawing(tuple(made.bars()), tuple(phases), alive, _host(log, made))


class _Slots:
    """Which operators share a slot."""

    def __init__(self, log: BlockLog) -> None:
        self._log = log
        self._computing = [o.index for o in log.operations if o.lane == "compute"]
        self._opened: list[list[Operation]] = []
        for operation in log.operations:
            if self._runs_beside(operation):
                continue
            if self._opened and self._shares(self._opened[-1], operation):
                self._opened[-1].append(operation)
            else:
                self._opened.append([operation])
        self._ends = [operations[-1].index for operations in self._opened]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._opened)

    def slot(self, index: int) -> int:
        """The slot of an operator; one that takes no time belongs to what follows."""
        return min(bisect_left(self._ends, index), self.count - 1)

    def bars(self) -> list[Bar]:
        """Everything that ran, by the slot at which it started."""
        found = [self._own(slot, operations) for slot, operations in enumerate(self._opened)]
        free: dict[Lane, float] = {}
        loops: set[tuple[Lane, int]] = set()
        for operation in self._log.operations:
            lane = operation.lane
            if not self._runs_beside(operation) or (lane, operation.loop) in loops:
                continue
            start, stop = float(self.slot(operation.index)), float(self._stop(operation))
            if operation.loop:
                loops.add((lane, operation.loop))
                stop = start + 1
            elif operation.kind == "copy":
                # One after the other; what compute waits for is complete by then.
                latest = stop - _COPY if lane == "copy_in" else float(self.count)
                start = max(start, min(free.get(lane, 0), latest))
                stop = start + _COPY
                free[lane] = stop
            found.append(_bar(operation, start, stop))
        return sorted(found, key=lambda bar: (bar.start, bar.lane))

    def _stop(self, operation: Operation) -> int:
        """The end of the slot of the last computation before an operation was waited for."""
        if operation.done is None:
            return self.count
        before = bisect_left(self._computing, operation.done)
        return self.slot(self._computing[before - 1]) + 1

    def _runs_beside(self, operation: Operation) -> bool:
        if operation.lane == "compute":
            return False
        if operation.loop or operation.lane == "copy_out":
            return True
        if operation.done is None:
            return operation.kind == "copy"
        following = bisect_left(self._computing, operation.index)
        return following < len(self._computing) and self._computing[following] < operation.done

    def _shares(self, opened: list[Operation], operation: Operation) -> bool:
        last = opened[-1]
        if last.lane != "compute" or operation.lane != "compute":
            return False
        if any(last.index < boundary <= operation.index for boundary in self._log.phases.values()):
            return False
        if operation.loop and operation.loop == last.loop:
            return True
        # A copy, a rotation or a conversion belongs to the GEMM before or after it.
        light = {last.kind, operation.kind} <= {"elementwise", "projection"}
        gemms = sum(o.kind == "projection" for o in (*opened, operation))
        return light and gemms < 2 and not self._started_between(last.index, operation.index)

    def _started_between(self, first: int, last: int) -> bool:
        return any(first < o.index <= last for o in self._log.operations if o.lane == "communication")

    def _own(self, slot: int, operations: list[Operation]) -> Bar:
        """One bar for what shares a slot; a GEMM in a tile loop gives it its name."""
        told = next((o for o in operations if o.kind == "projection"), operations[0])
        return _bar(told, slot, slot + 1, len(operations))


def _bar(operation: Operation, start: float, stop: float, count: int = 1) -> Bar:
    return Bar(
        lane=operation.lane, kind=operation.kind, name=operation.name, start=start, stop=stop, count=count
    )


def _alive(timeline: Timeline, made: _Slots) -> dict[str, tuple[int, ...]]:
    """What is alive in each slot when it is the most, by name."""
    live: dict[str, int] = {}
    most: list[dict[str, int]] = [{} for _ in range(made.count)]
    reached = [-1] * made.count
    slot = 0
    hidden = _workspaces(timeline)
    for event in timeline.events:
        index = _operator(event)
        if index is not None and (now := made.slot(index)) > slot:
            for later in range(slot + 1, now + 1):
                reached[later], most[later] = sum(live.values()), dict(live)
            slot = now
        a = event.allocation
        name = a.label or "tiles"
        if name in OUTSIDE or id(a) in hidden:
            continue
        live[name] = live.get(name, 0) + (-a.bytes if event.is_free else a.bytes)
        if (total := sum(live.values())) > reached[slot]:
            reached[slot], most[slot] = total, dict(live)
    for later in range(slot + 1, made.count):
        most[later] = dict(live)
    names = sorted({name for at in most for name, size in at.items() if size})
    return {name: tuple(at.get(name, 0) for at in most) for name in names}


def _workspaces(timeline: Timeline) -> set[int]:
    """What an operator allocates inside and frees before it returns: of the CPU's GEMMs and attention kernel."""
    made: dict[int, int | None] = {}
    found = set()
    for event in timeline.events:
        a = event.allocation
        if not event.is_free:
            made[id(a)] = _operator(event)
        elif a.label is None and (index := made.get(id(a))) is not None and index == _operator(event):
            found.add(id(a))
    return found


def _operator(event: Event) -> int | None:
    """The index of the operator during which something happened; None: between two."""
    return next((int(s.removeprefix(_OP)) for s in reversed(event.scope) if s.startswith(_OP)), None)


def _host(log: BlockLog, made: _Slots) -> tuple[int, ...]:
    """Host memory in use in each slot."""
    changes = [0] * made.count
    for index, size in log.host:
        changes[made.slot(index)] += size
    found, total = [], 0
    for change in changes:
        total += change
        found.append(total)
    return tuple(found)
