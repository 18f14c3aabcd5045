"""From a timeline to what `cpbench explain` shows: the course of memory, what is alive at the peak, what if not.

Leaving a group out does not take its bytes from the peak: it gives the highest of all moments without the group, which
may be another moment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise

from cpbench.explanation import Anatomy, CategoryEffect, Moment, PeakTensors
from cpbench.memory.categories import category
from cpbench.memory.timeline import Allocation, Event

_PHASES = ("forward", "backward", "optimizer")
_POINTS = 3000
_AROUND = 40
"""Turning points on each side of the peak that are kept in any case."""
_GROUPS = 16
"""Groups of tensors that are listed."""


def anatomy(events: Sequence[Event], *, step: str, host_bytes: int) -> Anatomy:
    """Return the anatomy of one step.

    Args:
        events: everything since before the parameters were made.
        step: name of the scope around the step.
        host_bytes: host memory of the rank, to pass on.
    """
    inside = [index for index, event in enumerate(events) if step in event.scope]
    first, last = inside[0], inside[-1]
    totals = _totals(events)
    top = max(inside, key=lambda index: totals[index])
    alive = _alive(events, top)
    groups: dict[tuple[Hashable, ...], list[Allocation]] = defaultdict(list)
    for a in alive:
        groups[_key(a)].append(a)
    ranked = sorted(groups, key=lambda key: -sum(a.bytes for a in groups[key]))[:_GROUPS]
    without = _without(events, inside, ranked)
    by_category: dict[str, int] = defaultdict(int)
    for a in alive:
        by_category[category(a) or "other"] += a.bytes
    tensors = tuple(
        PeakTensors(
            count=len(groups[key]),
            bytes=groups[key][0].bytes,
            category=category(groups[key][0]) or "other",
            site=groups[key][0].site or "python",
            made_in="/".join(_plain(groups[key][0].scope)) or "before the step",
            shape=groups[key][0].shape,
            dtype=groups[key][0].dtype,
            peak_without_bytes=without[key][0],
        )
        for key in ranked
    )
    categories = tuple(
        CategoryEffect(
            name=name,
            bytes=size,
            peak_without_bytes=without[(name,)][0],
            phase_without=_phase(events[without[(name,)][1]].scope),
        )
        for name, size in sorted(by_category.items(), key=lambda item: -item[1])
    )
    chosen = _thinned(totals, first, last, top)
    moments = _moments(events, chosen, first, step)
    return Anatomy(
        peak_bytes=totals[top],
        host_bytes=host_bytes,
        peak=moments[chosen.index(top)],
        timeline=tuple(moments),
        events=last - first + 1,
        categories=categories,
        tensors=tensors,
        unlisted_bytes=totals[top] - sum(t.total_bytes for t in tensors),
    )


def _totals(events: Sequence[Event]) -> list[int]:
    """Bytes alive after each event."""
    found, total = [], 0
    for event in events:
        total += _change(event)
        found.append(total)
    return found


def _change(event: Event) -> int:
    a = event.allocation
    return 0 if a.label == "host" else -a.bytes if event.is_free else a.bytes


def _alive(events: Sequence[Event], top: int) -> list[Allocation]:
    live: dict[int, Allocation] = {}
    for event in events[: top + 1]:
        a = event.allocation
        if a.label == "host":
            continue
        if event.is_free:
            live.pop(id(a), None)
        else:
            live[id(a)] = a
    return list(live.values())


def _key(a: Allocation) -> tuple[Hashable, ...]:
    """What equal tensors share; their layers may differ."""
    return category(a) or "other", a.site, a.bytes, a.shape, a.dtype, _plain(a.scope)


def _plain(scope: Iterable[str]) -> tuple[str, ...]:
    return tuple(name.split(":")[0] for name in scope)


def _without(
    events: Sequence[Event], inside: Sequence[int], ranked: Sequence[tuple[Hashable, ...]]
) -> dict[tuple[Hashable, ...], tuple[int, int]]:
    """Return, for every category as a tuple of one and for each listed group, (peak without it, where)."""
    wanted = set(ranked)
    live: dict[tuple[Hashable, ...], int] = defaultdict(int)
    keys: dict[int, tuple[tuple[Hashable, ...], ...]] = {}
    best: dict[tuple[Hashable, ...], tuple[int, int]] = {}
    reported = set(inside)
    total = 0
    for event in events:
        a = event.allocation
        if a.label != "host" and id(a) not in keys:
            key = _key(a)
            keys[id(a)] = ((key[0],), key) if key in wanted else ((key[0],),)
            for each in keys[id(a)]:
                live[each] += 0
    for index, event in enumerate(events):
        change = _change(event)
        total += change
        for each in keys.get(id(event.allocation), ()):
            live[each] += change
        if change <= 0 or index not in reported:
            continue
        for each, size in live.items():
            if each not in best or total - size > best[each][0]:
                best[each] = total - size, index
    return best


def _thinned(totals: Sequence[int], first: int, last: int, top: int) -> list[int]:
    """Positions to show: turning points, or the highest and lowest of each stretch where there are too many."""
    turns = [first]
    for index in range(first + 1, last):
        before, here, after = totals[index - 1], totals[index], totals[index + 1]
        if (here > before and here >= after) or (here < before and here <= after):
            turns.append(index)
    turns.append(last)
    if len(turns) > _POINTS:
        stretches = _POINTS // 2
        edges = [len(turns) * k // stretches for k in range(stretches + 1)]
        kept = set()
        for start, stop in pairwise(edges):
            stretch = turns[start:stop]
            kept |= {max(stretch, key=totals.__getitem__), min(stretch, key=totals.__getitem__)}
        middle = bisect_left(turns, top)
        turns = [*kept, *turns[max(0, middle - _AROUND) : middle + _AROUND]]
    return sorted({*turns, first, top, last})


def _moments(events: Sequence[Event], chosen: Sequence[int], first: int, step: str) -> list[Moment]:
    live: dict[str, int] = defaultdict(int)
    found = []
    wanted = set(chosen)
    for index, event in enumerate(events):
        name = category(event.allocation)
        if name is not None:
            live[name] += _change(event)
        if index in wanted:
            scope = [part for part in event.scope if part != step and part not in _PHASES]
            found.append(
                Moment(
                    at=index - first,
                    phase=_phase(event.scope),
                    place="/".join(scope),
                    by_category={key: size for key, size in live.items() if size},
                )
            )
    return found


def _phase(scope: Iterable[str]) -> str:
    return next((name for name in scope if name in _PHASES), "other")
