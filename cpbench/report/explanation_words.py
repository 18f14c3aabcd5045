"""What the terminal and the page of `cpbench explain` say in words: where a peak lies, what differs, and why."""

from __future__ import annotations

from collections.abc import Sequence

from cpbench.explanation import Explanation, Moment
from cpbench.units import format_bytes

_TELLING = 0.1
"""Part of the whole difference that a category must make to be named."""
_MOST_NAMED = 3


def where(moment: Moment) -> str:
    """Return where in the step a moment is, in words."""
    return f"{moment.phase}, {moment.place}" if moment.place else moment.phase


def difference(size: int) -> str:
    """Return a change of bytes with its sign."""
    return "±0" if size == 0 else f"{'+' if size > 0 else '-'}{format_bytes(abs(size))}"


def categories(explanations: Sequence[Explanation]) -> list[tuple[str, list[int]]]:
    """Return each category with its bytes at every case's peak, the largest difference or size first."""
    names = dict.fromkeys(c.name for e in explanations for c in e.anatomy.categories)
    rows = []
    for name in names:
        sizes = [next((c.bytes for c in e.anatomy.categories if c.name == name), 0) for e in explanations]
        rows.append((name, sizes))
    return sorted(rows, key=lambda row: -(max(row[1]) - (min(row[1]) if len(explanations) > 1 else 0)))


def limit_words(e: Explanation) -> str:
    """Return which limit of its machine a case meets, or how much of each it takes; empty without a profile."""
    if e.device_bytes is None:
        return ""
    over = e.anatomy.peak_bytes - e.device_bytes
    if over > 0:
        return f"does not fit: {format_bytes(over)} of device memory are missing"
    host = e.anatomy.host_bytes
    if e.host_room_bytes is None:
        return f"fits, with {format_bytes(-over)} of device memory to spare"
    if host > e.host_room_bytes:
        return f"does not fit: {format_bytes(host - e.host_room_bytes)} of host memory a rank are missing"
    parts = {
        "device memory": e.anatomy.peak_bytes / max(e.device_bytes, 1),
        "host memory": host / max(e.host_room_bytes, 1),
    }
    nearer, other = sorted(parts, key=lambda name: -parts[name])
    return f"fits; {nearer} ends it first, {parts[nearer]:.0%} of it are taken ({other}: {parts[other]:.0%})"


def why(explanations: Sequence[Explanation], names: Sequence[str]) -> str:
    """Return what makes the difference between two cases, and which limit each meets.

    Args:
        explanations: two.
        names: what to call them.
    """
    lean, large = sorted((0, 1), key=lambda k: explanations[k].anatomy.peak_bytes)
    gap = explanations[large].anatomy.peak_bytes - explanations[lean].anatomy.peak_bytes
    changes = [(name, sizes[large] - sizes[lean]) for name, sizes in categories(explanations)]
    if gap == 0:
        told = f"{names[0]} and {names[1]} have the same peak"
    else:
        named = [(name, size) for name, size in changes if abs(size) >= _TELLING * gap][:_MOST_NAMED]
        parts = [f"{name.replace('_', ' ')} {difference(size)}" for name, size in named]
        told = f"{names[large]} needs {format_bytes(gap)} more than {names[lean]} at its peak"
        told += f": {', '.join(parts)}" if parts else ""
    limits = [
        f"{name} {words}" for name, e in zip(names, explanations, strict=True) if (words := limit_words(e))
    ]
    return ". ".join([told, *limits]) + "."
