"""From a step over few layers to the step over many: the middle layers of a decoder do the same, so one is repeated.

A step is cut into passes over the layers (`cpbench.world.passes`), and the segments of middle layers are repeated. A
free points at an allocation in a segment at most a few layers away, and keeps that distance when its segment is
repeated.

Nothing is assumed that can be looked up: the middle layers must show the same segments to the last byte and scope.
Otherwise `NotPeriodic` is raised, and the caller runs all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from cpbench.memory.timeline import Allocation, Event
from cpbench.timing.operation import Operation
from cpbench.world.passes import ATTENTION, Item, NotPeriodic, Owner, Pass, Segment, Trace, made_by, passes_of

_MIDDLE = 2
"""Middle layers of each kind in a shallow model: one to repeat and one to compare it with."""

_NEAR = 2
"""Layers between a segment and what it refers to, when it is repeated together with its neighbours."""

_Thing = TypeVar("_Thing", Allocation, Operation)


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
    passes = passes_of(shallow, depth.shallow, step)
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

    def __init__(self, passes: list[Pass], depth: Depth, vector: _Vector) -> None:
        self._passes = passes
        self._vector = vector
        self._depth = depth
        self._templates = depth.templates()
        self._middles = depth.middles()
        self._sizes = depth.shallow, depth.deep  # looked at for every reference
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

    def _tokens(self, segment: Segment) -> Iterator[tuple[object, ...]]:
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

    def _emit(self, number: int, segment: Segment, layer: Owner) -> None:
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
        few, many = self._sizes
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


def _places(passes: list[Pass]) -> dict[int, _Place]:
    """Places of all that is referred to, by `id`.

    What nothing refers to is not counted: host memory is taken by the first layer that needs it and never given back.
    """
    segments = [(number, segment) for number, p in enumerate(passes) for segment in p.segments]
    wanted = {id(thing) for _, segment in segments for item in segment.items for thing in _referred(item)}
    places: dict[int, _Place] = {}
    for number, segment in segments:
        made = [id(thing) for item in segment.items for thing in made_by(item) if id(thing) in wanted]
        places |= {key: _Place(number, segment.layer, ordinal) for ordinal, key in enumerate(made)}
    return places


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
        if name.startswith(ATTENTION):
            names.append(f"{ATTENTION}{int(name[len(ATTENTION) :]) - template + layer}")
        else:
            names.append(name)
    return tuple(names)


__all__ = ["Depth", "NotPeriodic", "Owner", "Trace", "host_peak_bytes", "repeated"]
