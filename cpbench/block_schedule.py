"""What one attention block did on one rank, in order: operations by lane, and what was alive beside them.

Recorded by `cpbench.block_recorder` in a real run, drawn by `cpbench.report.schedules`.  Time is counted in *slots*:
one operation, with the small ones around it, takes one slot.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt

from cpbench.case import Dtype, OptionValue

Lane = Literal["compute", "communication", "copy_out", "copy_in"]
Kind = Literal["projection", "attention", "elementwise", "all_to_all", "all_gather", "send", "copy"]
PhaseName = Literal["forward", "recomputation", "backward"]


class Bar(BaseModel):
    """One operation, or several of a kind in a row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lane: Lane
    kind: Kind
    name: str
    """What it makes or moves, for example `q`."""
    start: NonNegativeFloat
    """First slot; half slots for what shares one."""
    stop: NonNegativeFloat
    """Slot at whose start it was complete: waited for, if it ran beside others."""
    count: PositiveInt = 1
    """Operations that it stands for."""


class Phase(BaseModel):
    """A stretch of slots."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: PhaseName
    start: NonNegativeInt
    stop: NonNegativeInt


class Sent(BaseModel):
    """One collective, or one tensor sent to a neighbour."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    bytes: NonNegativeInt
    """That the rank sent to others."""


class BlockSchedule(BaseModel):
    """One block on the rank whose peak was the highest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    options: dict[str, OptionValue]
    """Every option."""
    given: dict[str, OptionValue]
    """Options that were asked for."""
    emulated: bool
    """The rank ran alone, and the others sent what it has."""
    world_size: PositiveInt
    rank: NonNegativeInt
    seq_len: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    hidden_dim: PositiveInt
    dtype: Dtype
    torch: str
    unit_bytes: PositiveInt
    """M, one tensor of all query heads of a rank's tokens."""
    bars: tuple[Bar, ...]
    phases: tuple[Phase, ...]
    alive: dict[str, tuple[NonNegativeInt, ...]]
    """By name, bytes in each slot at the moment when all together were the most."""
    host: tuple[NonNegativeInt, ...]
    """Bytes of host memory in use in each slot."""
    forward_peak_bytes: NonNegativeInt
    """Highest sum of `alive` in forward."""
    backward_peak_bytes: NonNegativeInt
    """Highest sum of `alive` in recomputation and backward."""
    stated_forward_peak_bytes: NonNegativeInt
    """By the formula of the method's `costs`."""
    stated_backward_peak_bytes: NonNegativeInt
    sent: dict[PhaseName, tuple[Sent, ...]]
    """Collectives in the order in which they were started."""
    stated_sent: dict[PhaseName, dict[str, NonNegativeInt]]
    """Bytes by kind, by the method's `costs`."""

    @property
    def slots(self) -> int:
        """How many there are."""
        return len(self.host)

    def totals(self) -> list[int]:
        """Bytes alive in each slot."""
        return [sum(column) for column in zip(*self.alive.values(), strict=True)]

    def sent_by_kind(self, phase: PhaseName) -> dict[str, int]:
        """Bytes sent in a phase, by kind."""
        found: dict[str, int] = {}
        for sent in self.sent.get(phase, ()):
            found[sent.kind] = found.get(sent.kind, 0) + sent.bytes
        return found

    def in_units(self, size: float) -> NonNegativeFloat:
        """Return bytes as a multiple of M."""
        return size / self.unit_bytes


class BlockSchedules(BaseModel):
    """All recordings of one launch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schedules: tuple[BlockSchedule, ...]
