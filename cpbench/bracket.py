"""Finds the longest length that fits from few samples of how much room is left.

What a step needs of device and host memory is nearly linear in the sequence length, so two samples say where the room
ends, and two more show it: one that fits and its neighbour that does not.  Nothing is extrapolated in the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

_SECANTS = 10
"""Samples before halves are taken instead: the needs are then far from linear."""


class Room(NamedTuple):
    """Bytes left of device memory and of host memory; negative where it is short."""

    device: float
    host: float

    @property
    def fits(self) -> bool:
        """Whether neither is short."""
        return self.device >= 0 and self.host >= 0


@dataclass(frozen=True, slots=True)
class Bracket:
    """Neighbouring multiples of the unit, and everything that was sampled."""

    longest: int
    """Fits; 0 if the shortest does not."""
    shortest_too_long: int | None
    """Does not fit; None if `longest` is the limit of the search."""
    samples: dict[int, Room]

    @property
    def slope(self) -> Room | None:
        """Bytes that a token takes away, from the two longest samples; None of fewer."""
        if len(self.samples) < 2:
            return None
        (a, first), (b, last) = sorted(self.samples.items())[-2:]
        return Room((first.device - last.device) / (b - a), (first.host - last.host) / (b - a))


def longest_that_fits(
    room: Callable[[int], Room], *, unit: int, limit: int, start: int, slope: Room | None = None
) -> Bracket:
    """Return the longest multiple of `unit` up to `limit` that fits, with its neighbour that does not.

    Args:
        room: samples a length; room shrinks as lengths grow.
        unit: step of lengths.
        limit: nothing longer is sampled.
        start: the first sample, rounded to the unit.
        slope: bytes a token takes away, of something similar; saves a sample.

    Raises:
        ValueError: the limit is below one unit.
    """
    if limit < unit:
        raise ValueError(f"limit {limit} is below the unit {unit}")
    samples: dict[int, Room] = {}
    lower, upper = 0, limit // unit * unit + unit
    guess: float = start
    while upper - lower > unit:
        length = min(max(int(min(max(guess, 0), upper) // unit) * unit, lower + unit), upper - unit)
        samples[length] = room(length)
        if samples[length].fits:
            lower = length
        else:
            upper = length
        guess = (lower + upper) / 2 if len(samples) > _SECANTS else _end_of_room(samples, lower, upper, slope)
    return Bracket(lower, upper if upper in samples else None, samples)


def _end_of_room(samples: dict[int, Room], lower: int, upper: int, slope: Room | None) -> float:
    """Where the line through the two samples nearest to the end of the room, or of a given slope, meets zero."""
    nearest = sorted(samples, key=lambda length: min(abs(length - lower), abs(length - upper)))[:2]
    base = samples[nearest[0]]
    if len(nearest) > 1:
        a, b = sorted(nearest)
        first, last = samples[a], samples[b]
        slope = Room((first.device - last.device) / (b - a), (first.host - last.host) / (b - a))
    if slope is None:
        return 2 * nearest[0] if base.fits else nearest[0] / 2
    ends = [nearest[0] + left / per for left, per in zip(base, slope, strict=True) if per > 0]
    return min(ends, default=2 * nearest[0] if base.fits else nearest[0] / 2)
