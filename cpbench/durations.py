"""How long the steps of a case take together, and which time limits are too short for them.

A measured case runs `TRACED_STEPS` steps under the memory trace, which count as warm-up, and its timed steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cpbench.case import TRACED_STEPS, Case
from cpbench.hardware import Hardware
from cpbench.units import format_seconds

SAFETY = 2
"""A time limit is so many times the modelled duration: traced steps are slower, and the model may be off."""
START_SECONDS = 900.0
"""More, for starting processes, building the model and compiling kernels."""
_SHORT_STEP_SECONDS = 600.0
"""Steps up to here are timed three times, longer ones once."""
_ROUNDED_TO = 600
_LEAST_LIMIT = 1800
"""The default of --timeout."""


@dataclass(frozen=True, slots=True)
class StepBudget:
    """How to measure a case with a step of known duration."""

    steps: int
    """Timed ones."""
    seconds: float
    """Of all steps."""
    timeout_seconds: int
    """`SAFETY` times that and `START_SECONDS`, rounded up, and no less than the default."""


def steps_of(case: Case) -> int:
    """Return the steps that a case runs, warm-up included."""
    left_out = TRACED_STEPS - 1 if case.mode == "emulate" else 0
    return max(case.warmup, TRACED_STEPS) - left_out + case.steps


def step_budget(step_seconds: float) -> StepBudget:
    """Return how to measure a step that takes about so long."""
    steps = 3 if step_seconds <= _SHORT_STEP_SECONDS else 1
    seconds = (TRACED_STEPS + steps) * step_seconds
    return StepBudget(steps, seconds, _limit(seconds))


def least_seconds(case: Case, hardware: Hardware) -> float | None:
    """Return how long the steps of a case take at the least: its FLOPs at the peak of the devices.

    Args:
        case: measured or emulated.
        hardware: what it runs on; None is returned if it has no rates.
    """
    if hardware.rates is None:
        return None
    flops = case.architecture.step_flops(case.seq_len, case.batch_size) / case.world_size
    return steps_of(case) * flops / hardware.rates.matmul_flops_per_second


def too_short(cases: Sequence[Case], hardware: Hardware, *, name: str, timeout_seconds: float) -> str | None:
    """Return a warning if cases on GPUs cannot end within a time limit, or None.

    Args:
        cases: those that run.
        hardware: a profile.
        name: of the profile.
        timeout_seconds: for each case.
    """
    needs = [
        (least, case)
        for case in cases
        if case.mode != "estimate"
        and case.device == "cuda"
        and (least := least_seconds(case, hardware)) is not None
        and least > timeout_seconds
    ]
    if not needs:
        return None
    least, case = max(needs, key=lambda item: item[0])
    number = "1 case" if len(needs) == 1 else f"{len(needs)} cases"
    return (
        f"{number} cannot end within --timeout {timeout_seconds:g} ({format_seconds(timeout_seconds)}): "
        f"{case.title} runs {steps_of(case)} steps, {format_seconds(least)} at the peak speed of {name}; "
        f"try --timeout {_limit(least)}, fewer --steps, or `cpbench plan --seqlen` for a modelled duration"
    )


def longer_timeout(seconds: float, done: int, total: int) -> int | None:
    """Return a time limit for a case that had done some of its steps when its time was up; None if it had done none."""
    return _limit(seconds * total / done) if done else None


def _limit(seconds: float) -> int:
    return max(_LEAST_LIMIT, math.ceil((SAFETY * seconds + START_SECONDS) / _ROUNDED_TO) * _ROUNDED_TO)
