"""A step of few layers cut into passes: which events and operations belong to which layer.

A step is a sequence of allocations, frees and operations.  It is cut into segments, one a layer in each *pass*: the
persistent tensors in the order of the layers, forward (from where a layer's attention first shows to where the next
one's does), backward (the same, downwards), and every loop of the optimizer over the parameters.  There, a copy in
belongs to the layer that is updated while it is under way.  What lies between the passes is there once.  Each pass
must visit all layers in order, and whatever is alive before the step must have a known owner; otherwise `NotPeriodic`
is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cpbench.memory.timeline import Allocation, Event
from cpbench.timing.operation import Operation

ATTENTION = "attention:"
"""How the scope of a layer's attention begins; its number follows."""

Item = Event | Operation
Owner = int | None
"""A layer, or None for what the model has once."""
Stage = Literal["before", "start", "forward", "backward", "optimizer", "end"]


class NotPeriodic(Exception):
    """The layers of a shallow step differ where they should not; all layers must be run."""


@dataclass(slots=True)
class Trace:
    """A step over fake tensors: events and operations, each in order."""

    events: list[Event]
    operations: list[tuple[int, Operation]]
    """With the number of events before each."""
    owners: Mapping[int, Owner] = field(default_factory=dict)
    """Layers of the allocations that were there before the step, by `id`."""
    origins: Mapping[int, Allocation] = field(default_factory=dict)
    """Allocations that others were made from one by one, by the `id` of those."""
    parameters: int = 0
    """Parameter tensors: the optimizer handles some numbers as one vector with an element for each."""
    parameters_of_layer: int = 0

    def items(self, start: int = 0) -> Iterator[Item]:
        """Yield events from a position on, and the operations among them, as they came."""
        waiting = iter(self.operations)
        position, operation = next(waiting, (len(self.events) + 1, None))
        for index in range(len(self.events) + 1):
            while operation is not None and position <= index:
                if position >= start:
                    yield operation
                position, operation = next(waiting, (len(self.events) + 1, None))
            if start <= index < len(self.events):
                yield self.events[index]


@dataclass(slots=True)
class Segment:
    """Items of one layer in a pass."""

    layer: Owner
    items: list[Item] = field(default_factory=list)


@dataclass(slots=True)
class Pass:
    """Segments of all layers, or a single one without a layer."""

    stage: Stage
    segments: list[Segment]

    def of(self, layer: int) -> Segment:
        """Return the segment of a layer."""
        ascending = self.segments[0].layer == 0
        return self.segments[layer if ascending else len(self.segments) - 1 - layer]


def passes_of(trace: Trace, layers: int, step: str) -> list[Pass]:
    """Cut a shallow trace into its passes.

    Args:
        trace: from before the parameters were made.
        layers: of the shallow model.
        step: the scope of the step; of what came before it, what it left is kept.

    Raises:
        NotPeriodic: the trace does not have this form.
    """
    start = next((i for i, event in enumerate(trace.events) if step in event.scope), len(trace.events))
    freed = {id(event.allocation) for event in trace.events[:start] if event.is_free}
    owners: dict[int, Owner] = {}
    cutter = _Cutter(layers)
    for event in trace.events[:start]:
        key = id(event.allocation)
        if event.is_free or key in freed:
            continue
        if key not in trace.owners:
            raise NotPeriodic(f"{event.allocation.bytes} bytes from {event.allocation.site} have no owner")
        owners[key] = trace.owners[key]
        cutter.add("before", owners[key], event)
    moving = _Moving(layers)
    arriving: list[Item] = []
    for item in trace.items(start):
        stage, layer = moving.to(item)
        if stage == "optimizer":
            if isinstance(item, Operation) and item.stream == "copy_in":
                arriving.append(item)
                continue
            layer = _owner_of(item, owners, trace.origins)
        for each in (*arriving, item):
            for thing in made_by(each):
                owners[id(thing)] = layer
            cutter.add(stage, layer, each)
        arriving.clear()
    if arriving:
        raise NotPeriodic("the step ends with a copy to the device")
    return cutter.finish()


def made_by(item: Item) -> Sequence[Allocation | Operation]:
    """Return what an item brings into being, for later ones to refer to."""
    if isinstance(item, Operation):
        return (item,)
    return () if item.is_free else (item.allocation,)


def _owner_of(item: Item, owners: Mapping[int, Owner], origins: Mapping[int, Allocation]) -> Owner:
    """The layer of what an item works on."""
    thing = item.on if isinstance(item, Operation) else item.allocation
    while thing is not None:
        if id(thing) in owners:
            return owners[id(thing)]
        thing = origins.get(id(thing))
    return None


class _Moving:
    """Follows a step through its stages and, in forward and backward, through the layers."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._stage: Stage = "start"
        self._layer: Owner = None

    def to(self, item: Item) -> tuple[Stage, Owner]:
        """Return the stage and layer of the next item."""
        scope = item.scope
        if "optimizer" in scope:
            if self._stage == "backward" and self._layer == 0:
                self._stage = "optimizer"
            elif self._stage != "optimizer":
                raise NotPeriodic(f"the optimizer follows {self._stage}, layer {self._layer}")
            return self._stage, None
        if self._stage in ("optimizer", "end"):
            self._stage = "end"
            return self._stage, None
        here = next((int(name[len(ATTENTION) :]) for name in scope if name.startswith(ATTENTION)), None)
        if here is not None and here != self._layer:
            self._enter(here, backward="backward" in scope)
        elif here is not None and self._stage == "forward" and "backward" in scope:
            self._stage = "backward"  # the last layer is the first to come back
        return self._stage, self._layer

    def _enter(self, layer: int, *, backward: bool) -> None:
        last = -1 if self._layer is None else self._layer
        if not backward and self._stage in ("start", "forward") and layer == last + 1:
            self._stage, self._layer = "forward", layer
        elif backward and self._stage == "backward" and layer == last - 1:
            self._layer = layer
        else:
            raise NotPeriodic(f"layer {layer} follows {self._stage}, layer {self._layer}")
        if layer >= self._layers:
            raise NotPeriodic(f"layer {layer} of {self._layers}")


class _Cutter:
    """Puts items into segments and segments into passes."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._passes: list[Pass] = []

    def add(self, stage: Stage, layer: Owner, item: Item) -> None:
        last = self._passes[-1] if self._passes else None
        if last is None or last.stage != stage or not self._continues(last, layer):
            self._passes.append(Pass(stage, [Segment(layer)]))
        elif last.segments[-1].layer != layer:
            last.segments.append(Segment(layer))
        self._passes[-1].segments[-1].items.append(item)

    def _continues(self, last: Pass, layer: Owner) -> bool:
        before, first = last.segments[-1].layer, last.segments[0].layer
        if layer is None or before is None or first is None:
            return layer is before
        step = layer - before
        return step == 0 or (abs(step) == 1 and (len(last.segments) == 1 or (step > 0) == (before > first)))

    def finish(self) -> list[Pass]:
        for p in self._passes:
            seen = [segment.layer for segment in p.segments]
            whole = list(range(self._layers))
            if p.stage == "optimizer" and seen in (whole[:1], whole[-1:]):
                # What a loop left behind: it is there once, in the first or in the last layer.
                p.segments[0].layer = None
                continue
            if seen not in ([None], whole, whole[::-1]):
                raise NotPeriodic(f"a pass of {p.stage} visits layers {seen}")
        return self._passes
