"""What `cpbench verify` finds: one check a quantity, one verdict a method."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cpbench.case import Case, OptionValue

Verdict = Literal["pass", "fail", "unsupported", "error"]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(_Facts):
    """One quantity against its reference."""

    name: str
    """For example `out`, `dx`, `dwk`, `loss (plain)`, `causality`."""
    error: float | None
    """Relative error; None when it was not finite or there was nothing to compare."""
    limit: float
    """Largest error that passes."""
    passed: bool
    baseline: float | None = None
    """The error of `ulysses` at the same shape and dtype, where that decides the limit."""


class Verification(_Facts):
    """One method at one shape."""

    method: str
    options: dict[str, OptionValue] = Field(default_factory=dict)
    verdict: Verdict
    reason: str | None = None
    checks: tuple[Check, ...] = ()


class VerifyJob(_Facts):
    """What the measured half is asked to verify."""

    case: Case
    """The shape; every job has one case."""
    cases: tuple[Case, ...]
    """One a method and option set, resolved, all of that shape."""
    plugins: tuple[str, ...] = ()
    scratch: str
    log_dir: str


class VerifyReport(_Facts):
    """What the measured half answers; also what `verify --json` prints."""

    shape: dict[str, int | str]
    results: tuple[Verification, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; unsupported methods do not count."""
        return all(result.verdict in ("pass", "unsupported") for result in self.results)
