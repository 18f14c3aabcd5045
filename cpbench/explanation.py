"""Why the memory peak of a case is where it is: what `cpbench explain` finds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from cpbench.case import Case


class Moment(BaseModel):
    """A point of the step's timeline."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: NonNegativeInt
    """Allocations and frees since the step began."""
    phase: str
    """forward, backward, optimizer, or other."""
    place: str
    """The scope inside the phase, for example `block:31/attention:31`."""
    by_category: dict[str, int]
    """Bytes."""


class PeakTensors(BaseModel):
    """Equal tensors alive at the peak."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: PositiveInt
    bytes: NonNegativeInt
    """Of each."""
    category: str
    site: str
    """The line that made them."""
    made_in: str
    """Scopes open then, layers left out."""
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    peak_without_bytes: NonNegativeInt
    """The step's peak if these took nothing: it may lie elsewhere then."""

    @property
    def total_bytes(self) -> int:
        """Of all of them."""
        return self.count * self.bytes


class CategoryEffect(BaseModel):
    """One category at the peak, and the peak without it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bytes: NonNegativeInt
    """At the peak."""
    peak_without_bytes: NonNegativeInt
    phase_without: str
    """Where the peak lies without it."""


class Anatomy(BaseModel):
    """The memory of one estimated step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    peak_bytes: NonNegativeInt
    host_bytes: NonNegativeInt
    """Most host memory of this rank."""
    peak: Moment
    timeline: tuple[Moment, ...]
    """Thinned out: every local maximum, or the highest of each stretch where there are too many."""
    events: NonNegativeInt
    """Allocations and frees of the step."""
    categories: tuple[CategoryEffect, ...]
    """Largest first."""
    tensors: tuple[PeakTensors, ...]
    """Largest first; small ones are left out."""
    unlisted_bytes: NonNegativeInt
    """Of the tensors left out."""


class OptionEffect(BaseModel):
    """The same case with one option of the stack changed, estimated anew."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    option: str
    value: str
    peak_bytes: int | None
    """None: this cannot run."""
    host_bytes: int | None = None
    reason: str | None = None
    """Why not."""


class Explanation(BaseModel):
    """Everything about one case."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: Case
    anatomy: Anatomy
    options: tuple[OptionEffect, ...] = ()
    device_bytes: int | None = None
    """What tensors may take on the machine profile's device; None without a profile."""
    host_room_bytes: int | None = None
    """What a rank may pin of its node's host memory; None without a profile."""
