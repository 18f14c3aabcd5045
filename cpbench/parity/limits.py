"""Which error passes.

float32 must stay within 1e-5 of the reference.  bfloat16 is compared with the float32 reference of the same (rounded)
inputs and must stay within 1.5 times the error of a baseline: `ulysses` at the same shape, or `single` on one rank
where `ulysses` cannot run it; both errors are root mean squares over several inputs (`cpbench.parity.rank.DRAWS`),
because over one a few roundings decide.  Loss and gradient norm, being single numbers, may be wrong by the standard
error of a mean over the tokens of values rounded to bfloat16 if that is larger, because a baseline's error may be near
zero by luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from cpbench.case import Case
from cpbench.verification import Check, Kind

FLOAT32_LIMIT = 1e-5
BFLOAT16_FACTOR = 1.5
_BFLOAT16_STEP = 2**-8


class Limits:
    """The limits at one shape; baselines are measured when they are first needed."""

    def __init__(self, case: Case, baseline: Callable[[str], dict[str, float]]) -> None:
        """Make the limits of a shape.

        Args:
            case: gives dtype and tokens.
            baseline: errors of the baseline by quantity, for `block` or the name of a stack; every rank calls it.
        """
        self._float32 = case.dtype == "float32"
        self._tokens = case.seq_len * case.batch_size
        self._measure = baseline
        self._known: dict[str, dict[str, float]] = {}

    def check(self, kind: Kind, name: str, error: float, *, what: str, where: str, runs: int = 1) -> Check:
        """Return a check of an error.

        Args:
            kind: of the check.
            name: of the check.
            error: relative, infinite or NaN if not finite.
            what: the quantity, by which the baseline is looked up.
            where: `block`, or the name of a stack.
            runs: independent runs whose errors add up, when a method is compared with itself.
        """
        baseline = None if self._float32 else self._baseline(where)[what]
        if baseline is None:
            limit = FLOAT32_LIMIT
        else:
            limit = runs * BFLOAT16_FACTOR * baseline
            if kind in ("loss", "grad norm"):
                limit = max(limit, _BFLOAT16_STEP / self._tokens**0.5)
        finite = math.isfinite(error)
        return Check(
            kind=kind,
            name=name,
            error=error if finite else None,
            limit=limit,
            passed=finite and error <= limit,
            baseline=baseline,
        )

    def prepare(self, where: str) -> None:
        """Measure a baseline; called by every rank, because the baseline runs on all of them."""
        if not self._float32:
            self._baseline(where)

    def _baseline(self, where: str) -> dict[str, float]:
        if where not in self._known:
            self._known[where] = self._measure(where)
        return self._known[where]


def exact(kind: Kind, name: str, error: float, detail: str | None = None) -> Check:
    """Return a check that only an error of zero passes."""
    finite = math.isfinite(error)
    return Check(
        kind=kind,
        name=name,
        error=error if finite else None,
        limit=0.0,
        passed=error == 0.0,
        detail=detail if error else None,
    )
