"""Loss and gradient norm of the whole model over three optimizer steps, against `single` in the plain stack."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from cpbench import registry
from cpbench.case import STACKS, Case, Stack
from cpbench.method import Method
from cpbench.model.tiling import Tiles
from cpbench.parity.block import parts_tile
from cpbench.parity.limits import Limits
from cpbench.parity.ranks import Ranks
from cpbench.parity.reference import relative_error
from cpbench.runtime.recorder import Recorder
from cpbench.train import TrainStep
from cpbench.verification import Check

STEPS = 3
Scalar = Literal["loss", "grad norm"]
_TILES = Tiles(norm=24, mlp=20, loss=28)
"""So small that the shortest sequences have several, the last one shorter."""


def train(case: Case, method: Method, ranks: Ranks) -> list[float]:
    """Return the losses of three steps, then their gradient norms."""
    world = ranks.world(method.layout(case, ranks.rank))
    step = TrainStep(case, method, world, Recorder(), replace(_TILES, parts=parts_tile(case)))
    results = [step.run(index) for index in range(STEPS)]
    return [result.loss.item() for result in results] + [result.grad_norm.item() for result in results]


def train_single(case: Case, ranks: Ranks) -> list[float]:
    """Return what `single` gives on one rank, in float32 and in the plain stack."""
    update = {
        "method": "single",
        "options": {},
        "world_size": 1,
        "stack": STACKS["plain"],
        "dtype": "float32",
    }
    return train(case.model_copy(update=update), registry.load("single", {}), ranks)


def errors(ours: list[float], wanted: list[float]) -> dict[Scalar, float]:
    """Return the relative errors of loss and gradient norm.

    Args:
        ours: as `train` returns them.
        wanted: of `single`.
    """
    parts: tuple[tuple[Scalar, slice], ...] = (("loss", slice(0, STEPS)), ("grad norm", slice(STEPS, None)))
    return {
        kind: relative_error(torch.tensor(ours[part]), torch.tensor(wanted[part])) for kind, part in parts
    }


def against_single(ours: list[float], wanted: list[float], stack: str, limits: Limits) -> list[Check]:
    """Compare losses and gradient norms; see `errors`."""
    return [
        limits.check(kind, f"{kind} ({stack})", error, what=kind, where=stack)
        for kind, error in errors(ours, wanted).items()
    ]


def in_stack(case: Case, stack: Stack) -> Case:
    """Return the case in another stack."""
    return case.model_copy(update={"stack": stack})
