"""Finds the longest length that fits from few samples of how much room is left.

What a step needs of device and host memory is nearly linear in the sequence length, so two samples say where the room
ends, and two more show it: one that fits and its neighbour that does not.  Nothing is extrapolated in the answer.
"""

from __future__ import annotations

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


class LengthSearch:
    """Looks for the longest multiple of a unit that fits: sample `next_length`, `add` what room it leaves."""

    def __init__(self, *, unit: int, limit: int, start: int, slope: Room | None = None) -> None:
        """Begin; nothing is sampled yet.

        Args:
            unit: step of lengths.
            limit: nothing longer is sampled.
            start: the first sample, rounded to the unit.
            slope: bytes a token takes away, of something similar; saves a sample.

        Raises:
            ValueError: the limit is below one unit.
        """
        if limit < unit:
            raise ValueError(f"limit {limit} is below the unit {unit}")
        self._unit = unit
        self._slope = slope
        self._samples: dict[int, Room] = {}
        self._lower, self._upper = 0, limit // unit * unit + unit
        self._guess: float = start

    @property
    def next_length(self) -> int | None:
        """What to sample next; None once the answer is known."""
        unit, lower, upper = self._unit, self._lower, self._upper
        if upper - lower <= unit:
            return None
        return min(max(int(min(max(self._guess, 0), upper) // unit) * unit, lower + unit), upper - unit)

    def add(self, length: int, room: Room) -> None:
        """Note the room that `next_length` leaves; room shrinks as lengths grow."""
        self._samples[length] = room
        if room.fits:
            self._lower = length
        else:
            self._upper = length
        if len(self._samples) > _SECANTS:
            self._guess = (self._lower + self._upper) / 2
        else:
            self._guess = _end_of_room(self._samples, self._lower, self._upper, self._slope)

    @property
    def found(self) -> Bracket:
        """The answer, once there is nothing left to sample."""
        upper = self._upper if self._upper in self._samples else None
        return Bracket(self._lower, upper, self._samples)


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
