"""From a step over few layers to the step over many: the middle layers of a decoder do the same, so one is repeated.

A step is a sequence of allocations, frees and operations.  It is cut into segments, one a layer in each *pass*: the
persistent tensors in the order of the layers, forward (from where a layer's attention first shows to where the next
one's does), backward (the same, downwards), and every loop of the optimizer over the parameters.  What lies between
the passes is there once.  A free points at an allocation in a segment at most a few layers away, and keeps that
distance when its segment is repeated.

Nothing is assumed that can be looked up: the middle layers must show the same segments to the last byte and scope,
each pass must visit all layers in order, and whatever is alive before the step must have a known owner.  Otherwise
`NotPeriodic` is raised, and the caller runs all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, TypeVar

from cpbench.memory.timeline import Allocation, Event
from cpbench.timing.operation import Operation

_ATTENTION = "attention:"
_MIDDLE = 2
"""Middle layers of each kind in a shallow model: one to repeat and one to compare it with."""

_NEAR = 2
"""Layers between a segment and what it refers to, when it is repeated together with its neighbours."""

Item = Event | Operation
Owner = int | None
"""A layer, or None for what the model has once."""
_Thing = TypeVar("_Thing", Allocation, Operation)
Stage = Literal["before", "start", "forward", "backward", "optimizer", "end"]


class NotPeriodic(Exception):
    """The layers of a shallow step differ where they should not; all layers must be run."""


@dataclass(frozen=True, slots=True)
class Depth:
    """How the layers of a deep model correspond to those of a shallow one."""

    kinds: tuple[int, ...]
    """Consecutive deep layers of each kind."""
    below: int
    """First layers of a kind that may differ from those in the middle."""
    above: int
    """Last layers of a kind that may."""

    @property
    def deep(self) -> int:
        """Layers of the deep model."""
        return sum(self.kinds)

    @property
    def shallow_kinds(self) -> tuple[int, ...]:
        """Layers of each kind in the shallow model."""
        return tuple(min(count, self.below + _MIDDLE + self.above) for count in self.kinds)

    @property
    def shallow(self) -> int:
        """Layers of the shallow model."""
        return sum(self.shallow_kinds)

    def templates(self) -> list[int]:
        """Return for each deep layer the shallow one that it repeats."""
        result: list[int] = []
        for count, few, first in self._by_kind():
            more = count - few
            middle = self.below
            layers = [*range(middle), *[middle] * more, *range(middle, few)] if more else range(few)
            result += [first + layer for layer in layers]
        return result

    def middles(self) -> list[range]:
        """Return the shallow layers that must be equal, by kind."""
        return [
            range(first + self.below, first + few - self.above)
            for count, few, first in self._by_kind()
            if count > few
        ]

    def _by_kind(self) -> Iterator[tuple[int, int, int]]:
        """(deep layers, shallow layers, the first shallow one) of each kind."""
        first = 0
        for count, few in zip(self.kinds, self.shallow_kinds, strict=True):
            yield count, few, first
            first += few


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
class _Segment:
    layer: Owner
    items: list[Item] = field(default_factory=list)


@dataclass(slots=True)
class _Pass:
    """Segments of all layers, or a single one without a layer."""

    stage: Stage
    segments: list[_Segment]

    def of(self, layer: int) -> _Segment:
        ascending = self.segments[0].layer == 0
        return self.segments[layer if ascending else len(self.segments) - 1 - layer]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an allocation or an operation was made."""

    number: int
    """Of the pass."""
    layer: Owner
    ordinal: int
    """Among those of its segment that something refers to."""


def repeated(shallow: Trace, depth: Depth, *, step: str) -> Trace:
    """Return the trace of a deep step.

    Args:
        shallow: of `depth.shallow` layers, from before the parameters were made.
        depth: how the layers correspond.
        step: the scope of the step; what came before it is reduced to what it left.

    Raises:
        NotPeriodic: the shallow trace does not have the form that can be repeated.
    """
    passes = _passes(shallow, depth.shallow, step)
    more = shallow.parameters_of_layer * (depth.deep - depth.shallow)
    return _Repetition(passes, depth, _Vector(shallow.parameters, shallow.parameters + more)).run()


def host_peak_bytes(events: Iterable[Event]) -> int:
    """Return the most bytes of host memory held at once."""
    held = peak = 0
    for event in events:
        if event.allocation.label == "host":
            held += -event.allocation.bytes if event.is_free else event.allocation.bytes
            peak = max(peak, held)
    return peak


def _passes(trace: Trace, layers: int, step: str) -> list[_Pass]:
    """Cut a shallow trace into its passes."""
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
    for item in trace.items(start):
        stage, layer = moving.to(item)
        if stage == "optimizer":
            layer = _owner_of(item, owners, trace.origins)
        for thing in _made(item):
            owners[id(thing)] = layer
        cutter.add(stage, layer, item)
    return cutter.finish()


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
        here = next((int(name[len(_ATTENTION) :]) for name in scope if name.startswith(_ATTENTION)), None)
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
        self._passes: list[_Pass] = []

    def add(self, stage: Stage, layer: Owner, item: Item) -> None:
        last = self._passes[-1] if self._passes else None
        if last is None or last.stage != stage or not self._continues(last, layer):
            self._passes.append(_Pass(stage, [_Segment(layer)]))
        elif last.segments[-1].layer != layer:
            last.segments.append(_Segment(layer))
        self._passes[-1].segments[-1].items.append(item)

    def _continues(self, last: _Pass, layer: Owner) -> bool:
        before, first = last.segments[-1].layer, last.segments[0].layer
        if layer is None or before is None or first is None:
            return layer is before
        step = layer - before
        return step == 0 or (abs(step) == 1 and (len(last.segments) == 1 or (step > 0) == (before > first)))

    def finish(self) -> list[_Pass]:
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


@dataclass(frozen=True, slots=True)
class _Vector:
    """What the optimizer makes of one number a parameter: a vector that is longer in the deep model."""

    shallow: int
    deep: int
    """Elements, one a parameter."""

    def bytes(self, size: int) -> int:
        """The size of a tensor of the optimizer's that belongs to no layer."""
        return 4 * self.deep if size == 4 * self.shallow else size

    def sent(self, o: Operation) -> tuple[int, tuple[int, ...]]:
        """(bytes, shape) of a collective of the optimizer's."""
        if o.work != "collective" or o.shape != (self.shallow,) or self.shallow == self.deep:
            return o.size, o.shape
        if o.name != "all_reduce":
            raise NotPeriodic(f"{o.name} of one element a parameter")
        return 2 * 4 * self.deep * (o.ranks - 1) // o.ranks, (self.deep,)


class _Repetition:
    """Makes the deep trace."""

    def __init__(self, passes: list[_Pass], depth: Depth, vector: _Vector) -> None:
        self._passes = passes
        self._vector = vector
        self._depth = depth
        self._templates = depth.templates()
        self._middles = depth.middles()
        self._places = _places(passes)
        self._deep: dict[tuple[int, Owner], list[Allocation | Operation]] = {}
        self._compared: set[tuple[int, Owner]] = set()
        self._result = Trace([], [])

    def run(self) -> Trace:
        for number, p in enumerate(self._passes):
            if p.segments[0].layer is None:
                self._emit(number, p.segments[0], None)
                continue
            for middle in self._middles:
                first, *others = (list(self._tokens(p.of(layer))) for layer in middle)
                if any(other != first for other in others):
                    raise NotPeriodic(f"layers {list(middle)} differ in {p.stage}")
            deep = range(self._depth.deep)
            for layer in deep if p.segments[0].layer == 0 else reversed(deep):
                self._emit(number, p.of(self._templates[layer]), layer)
        return self._result

    def _tokens(self, segment: _Segment) -> Iterator[tuple[object, ...]]:
        """What must be equal of two segments that stand for one another."""
        for item in segment.items:
            places = [self._places[id(thing)] for thing in _referred(item)]
            refers = [
                (
                    place.number,
                    None if place.layer is None else place.layer - (segment.layer or 0),
                    place.ordinal,
                )
                for place in places
            ]
            scope = _renamed(item.scope, segment.layer, 0)
            yield (*_facts(item, segment.layer), scope, refers)

    def _emit(self, number: int, segment: _Segment, layer: Owner) -> None:
        made = self._deep.setdefault((number, layer), [])
        events, operations = self._result.events, self._result.operations
        template = segment.layer
        once = template is None and self._passes[number].stage == "optimizer"
        for item in segment.items:
            scope = _renamed(item.scope, template, layer)
            if isinstance(item, Operation):
                waits = tuple([self._found(thing, template, layer) for thing in item.waits])
                operation = _copied(item, scope, waits)
                if once:
                    operation.size, operation.shape = self._vector.sent(item)
                if id(item) in self._places:
                    made.append(operation)
                operations.append((len(events), operation))
            elif item.is_free:
                events.append(Event(self._found(item.allocation, template, layer), True, scope))
            else:
                a = item.allocation
                size = self._vector.bytes(a.bytes) if once else a.bytes
                allocation = Allocation(
                    size, _renamed(a.scope, template, layer), a.site, a.inside_kernel, a.label
                )
                allocation.shape, allocation.dtype = a.shape, a.dtype
                if id(a) in self._places:
                    made.append(allocation)
                events.append(Event(allocation, False, scope))

    def _found(self, thing: _Thing, template: Owner, layer: Owner) -> _Thing:
        """The deep counterpart of what an item of a shallow layer refers to."""
        place = self._places[id(thing)]
        target = self._target(place.layer, template, layer)
        made = self._deep.get((place.number, target), [])
        found = made[place.ordinal] if place.ordinal < len(made) else None
        if isinstance(found, type(thing)):
            # Layers of one template are made alike, so that it is enough to look once.
            key = (id(thing), None if target is None else self._templates[target])
            if key in self._compared:
                return found
            if target is None or _nature(found, target) == _nature(thing, place.layer):
                self._compared.add(key)
                return found
        raise NotPeriodic(f"what layer {template} refers to in pass {place.number} is something else")

    def _target(self, there: Owner, template: Owner, layer: Owner) -> Owner:
        """The deep layer that stands to `layer` as the shallow `there` stands to `template`."""
        if there is None:
            return None
        few, many = self._depth.shallow, self._depth.deep
        if template is not None and layer is not None and abs(there - template) <= _NEAR:
            target = layer + there - template
            shown = self._templates[target] if 0 <= target < many else -1
            if shown == there or any(template in middle for middle in self._middles):
                return target
            if any(shown in middle and there in middle for middle in self._middles):
                return target
        elif there < self._depth.below:
            return there
        elif there >= few - self._depth.above:
            return many - few + there
        raise NotPeriodic(f"layer {template} refers to layer {there}")


def _places(passes: list[_Pass]) -> dict[int, _Place]:
    """Places of all that is referred to, by `id`.

    What nothing refers to is not counted: host memory is taken by the first layer that needs it and never given back.
    """
    segments = [(number, segment) for number, p in enumerate(passes) for segment in p.segments]
    wanted = {id(thing) for _, segment in segments for item in segment.items for thing in _referred(item)}
    places: dict[int, _Place] = {}
    for number, segment in segments:
        made = [id(thing) for item in segment.items for thing in _made(item) if id(thing) in wanted]
        places |= {key: _Place(number, segment.layer, ordinal) for ordinal, key in enumerate(made)}
    return places


def _made(item: Item) -> Sequence[Allocation | Operation]:
    """What an item brings into being, for later ones to refer to."""
    if isinstance(item, Operation):
        return (item,)
    return () if item.is_free else (item.allocation,)


def _referred(item: Item) -> Sequence[Allocation | Operation]:
    if isinstance(item, Operation):
        return item.waits
    return (item.allocation,) if item.is_free else ()


def _facts(item: Item, layer: Owner) -> tuple[object, ...]:
    if isinstance(item, Operation):
        return _nature(item, layer)
    return ("free",) if item.is_free else _nature(item.allocation, layer)


def _nature(thing: Allocation | Operation, layer: Owner) -> tuple[object, ...]:
    """What a thing is, apart from the number of its layer."""
    scope = _renamed(thing.scope, layer, 0)
    if isinstance(thing, Allocation):
        return (thing.bytes, thing.site, thing.inside_kernel, thing.label, scope)
    return (
        *(thing.name, thing.work, thing.stream, thing.flops, thing.size, thing.shape, thing.ranks),
        *(thing.ranks_on_node, thing.times, scope),
    )


def _owner_of(item: Item, owners: Mapping[int, Owner], origins: Mapping[int, Allocation]) -> Owner:
    """The layer of what an item works on."""
    thing = item.on if isinstance(item, Operation) else item.allocation
    while thing is not None:
        if id(thing) in owners:
            return owners[id(thing)]
        thing = origins.get(id(thing))
    return None


def _copied(o: Operation, scope: tuple[str, ...], waits: tuple[Operation, ...]) -> Operation:
    return Operation(
        *(o.name, o.work, o.stream, scope, o.flops, o.size, o.shape, o.ranks, o.ranks_on_node, o.times, waits)
    )


@cache
def _renamed(scope: tuple[str, ...], template: Owner, layer: Owner) -> tuple[str, ...]:
    """The scope with another layer's name in it."""
    if template is None or layer is None:
        return scope
    names = []
    for name in scope:
        if name.startswith(_ATTENTION):
            names.append(f"{_ATTENTION}{int(name[len(_ATTENTION) :]) - template + layer}")
        else:
            names.append(name)
    return tuple(names)
