"""Doubts about finished cases: a loss that differs from the one of `single`, sources that changed in between.

`single` is the reference because it has no communication that could be wrong.  A case whose loss differs is
shown in the table and flagged, but takes part in no picture: its step did not compute the same thing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cpbench.report.load import Entry

REFERENCE = "single"

LOSS_TOLERANCE: dict[str, float] = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative; float32 sums in another order, bfloat16 rounds to 8 bits of mantissa at every operator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCheck:
    """A case's loss held against the one of `single`."""

    relative: float | None
    """|loss - reference| / |reference|; None where there is nothing to compare with."""
    tolerance: float

    @property
    def differs(self) -> bool:
        """The loss is too far from the reference for the case to have computed the same step."""
        return self.relative is not None and not self.relative <= self.tolerance


def check_losses(entries: Sequence[Entry]) -> tuple[LossCheck, ...]:
    """Compare every entry with `single` at the same model, length, dtype, seed, batch size and device.

    Only measured cases have a loss that means something: in emulation, a rank talks to itself.
    """
    references: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.record.method == REFERENCE and _has_loss(entry):
            references[_question(entry)].append(entry)
    return tuple(_check(entry, references[_question(entry)]) for entry in entries)


def mixed_sources(entries: Iterable[Entry]) -> list[str]:
    """Say where numbers of one method come from different sources of the method within one run."""
    hashes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in entries:
        if entry.record.status == "ok" and entry.record.method_source_hash:
            hashes[entry.run, entry.record.method].add(entry.record.method_source_hash)
    return [
        f"run {run}: the source of method {method} changed between its cases ({', '.join(sorted(found))})"
        for (run, method), found in sorted(hashes.items())
        if len(found) > 1
    ]


def _question(entry: Entry) -> tuple[Any, ...]:
    r = entry.record
    return r.model, r.architecture, r.seq_len, r.dtype, r.seed, r.batch_size, r.device


def _has_loss(entry: Entry) -> bool:
    return entry.record.status == "ok" and entry.record.mode == "measure" and bool(_losses(entry))


def _losses(entry: Entry) -> tuple[float | None, ...]:
    losses = entry.record.losses or (entry.record.loss,)
    return losses if None not in losses else ()


def _check(entry: Entry, references: Sequence[Entry]) -> LossCheck:
    tolerance = LOSS_TOLERANCE.get(entry.record.dtype, min(LOSS_TOLERANCE.values()))
    if not references or not _has_loss(entry) or entry.record.method == REFERENCE:
        return LossCheck(relative=None, tolerance=tolerance)
    reference = max(references, key=lambda other: _closeness(entry, other))
    # Runs with different numbers of steps are compared at the last step that both took.
    last = min(len(_losses(entry)), len(_losses(reference))) - 1
    mine, theirs = _losses(entry)[last], _losses(reference)[last]
    assert mine is not None  # _has_loss has seen to it
    assert theirs is not None
    relative = abs(mine - theirs) / abs(theirs) if theirs else (0.0 if mine == theirs else math.inf)
    return LossCheck(relative=relative, tolerance=tolerance)


def _closeness(entry: Entry, reference: Entry) -> tuple[bool, bool, bool]:
    mine, theirs = entry.record, reference.record
    return entry.run == reference.run, mine.machine == theirs.machine, mine.stack == theirs.stack
