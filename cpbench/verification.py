"""What `cpbench verify` finds: one check a quantity, one verdict a method, option set and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cpbench.case import STACKS, Case, Device, OptionValue, Stack
from cpbench.shape import Shape

Verdict = Literal["pass", "fail", "unsupported", "error"]
Kind = Literal["out", "gradients", "causality", "permutation", "loss", "grad norm", "sent", "peaks"]

STACKS_CHECKED: dict[str, Stack] = {
    "plain": STACKS["plain"],
    "checkpoint": STACKS["checkpoint"],
    "long": STACKS["long"],
    "optimizer offload": STACKS["long"].model_copy(update={"optimizer_offload": True}),
    "save attention": STACKS["long"].model_copy(update={"save_attention": 1}),
}
"""Stacks in which whole models are trained."""


def title(method: str, given: Mapping[str, OptionValue]) -> str:
    """Return a method with its options on one line, for example `upipe stage_heads=8`."""
    return " ".join([method, *(f"{key}={value}" for key, value in given.items())])


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(_Facts):
    """One quantity against its reference."""

    kind: Kind
    name: str
    """For example `out`, `dx (checkpoint)`, `dwk (heads permuted)`, `loss (long)`, `causality (backward)`."""
    error: float | None
    """Relative error; None when it was not finite."""
    limit: float
    """Largest error that passes."""
    passed: bool
    baseline: float | None = None
    """In bfloat16, the error of the baseline method at the same shape, which decides the limit."""
    detail: str | None = None
    """The two quantities in words, where an error alone says too little."""


class Peaks(_Facts):
    """What one attention block was counted to hold and what the method states, at a long length; bytes."""

    tokens_per_rank: int
    head_dim: int
    """Width of a head: that of the shape, or more if peaks would be too small beside tiles."""
    unit_bytes: int
    """M: one tensor of all query heads of a rank's tokens."""
    forward_bytes: int
    backward_bytes: int
    host_bytes: int
    """Host memory that the block took."""
    stated_forward_bytes: int
    """0: the method states none."""
    stated_backward_bytes: int


class Verification(_Facts):
    """One method with one option set at one shape."""

    method: str
    options: dict[str, OptionValue] = Field(default_factory=dict)
    given: dict[str, OptionValue] = Field(default_factory=dict)
    """Those of the options that were asked for; the others have their defaults."""
    shape: Shape
    verdict: Verdict
    reason: str | None = None
    checks: tuple[Check, ...] = ()
    forward_sent: dict[str, int] = Field(default_factory=dict)
    """Bytes by kind of collective that a block really sent."""
    backward_sent: dict[str, int] = Field(default_factory=dict)
    peaks: Peaks | None = None
    """None where nothing could be counted."""


class VerifyItem(_Facts):
    """One verification to make."""

    case: Case
    """Resolved."""
    given: dict[str, OptionValue] = Field(default_factory=dict)
    """The options that were asked for."""
    stacks: tuple[str, ...] = ()
    """Stacks, by their names in `STACKS_CHECKED`, in which the whole model is trained too."""
    count: bool = False
    """Count the peaks of the block at a long length too."""


class VerifyJob(_Facts):
    """What the measured half is asked to verify; cases that share a shape stand together."""

    case: Case
    """The widest; every job has one case."""
    items: tuple[VerifyItem, ...]
    plugins: tuple[str, ...] = ()
    scratch: str
    log_dir: str
    collective_seconds: float = 120.0
    """After so long a rank that waits for another gives up."""


class VerifyAnswer(_Facts):
    """One line of the file into which rank 0 writes what it has found so far."""

    index: int
    """Position in the job."""
    result: Verification


class VerifyEnd(_Facts):
    """What rank 0 reports at its end."""

    checked: int
    """Items that have an answer; fewer than the job's when the ranks lost each other."""


class MethodFindings(_Facts):
    """One method with one option set over all shapes."""

    method: str
    options: dict[str, OptionValue]
    given: dict[str, OptionValue]
    verdict: Verdict
    """The worst of its shapes; `unsupported` only if it supports none."""
    passed: int
    """Shapes that passed."""
    supported: int
    """Shapes that the method can run."""
    reason: str | None = None


class VerifyReport(_Facts):
    """Everything that a verification found; what `verify --json` prints."""

    device: Device
    shared_gpu: bool = False
    """Whether all ranks ran on one GPU, and exchanged their tensors through host memory."""
    methods: tuple[MethodFindings, ...]
    results: tuple[Verification, ...]

    @classmethod
    def of(cls, device: Device, results: Sequence[Verification], *, gpus: int = 0) -> VerifyReport:
        """Return the report of results, which are in order of method and options, on a machine of so many GPUs."""
        groups: dict[str, list[Verification]] = {}
        for result in results:
            groups.setdefault(title(result.method, result.given), []).append(result)
        return cls(
            device=device,
            shared_gpu=device == "cuda" and any(gpus < result.shape.world_size for result in results),
            methods=tuple(_findings(group) for group in groups.values()),
            results=tuple(result for group in groups.values() for result in group),
        )

    @property
    def passed(self) -> bool:
        """Whether nothing failed; shapes that a method cannot run do not count."""
        return all(result.verdict in ("pass", "unsupported") for result in self.results)


def _findings(group: Sequence[Verification]) -> MethodFindings:
    verdicts: tuple[Verdict, ...] = ("error", "fail", "pass", "unsupported")
    verdict = next(verdict for verdict in verdicts if any(result.verdict == verdict for result in group))
    reasons = dict.fromkeys(
        f"{result.reason} (at {result.shape.title})" if verdict != "unsupported" else str(result.reason)
        for result in group
        if result.reason and result.verdict in ("error", "fail", verdict)
    )
    return MethodFindings(
        method=group[0].method,
        options=group[0].options,
        given=group[0].given,
        verdict=verdict,
        passed=sum(result.verdict == "pass" for result in group),
        supported=sum(result.verdict != "unsupported" for result in group),
        reason="\n".join(reasons) or None,
    )
