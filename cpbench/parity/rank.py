"""One rank of a verification at one shape: every check of one method; every rank makes the same calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from cpbench import registry
from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.method import Method
from cpbench.parity import checks, train
from cpbench.parity.block import Block, BlockRun, Surroundings
from cpbench.parity.limits import Limits
from cpbench.parity.peaks import peak_checks
from cpbench.parity.ranks import Ranks
from cpbench.parity.reference import make_inputs, reference_block, relative_error
from cpbench.shape import Shape
from cpbench.verification import STACKS_CHECKED, Check, Peaks, Verification

_BASELINES = ("ulysses", "single")
_DESCRIBED = 4
DRAWS = 4
"""Independent inputs in bfloat16.  A few probabilities of the first tokens, to which all others attend, are rounded to
make most of a gradient's error: over one draw the ratio of two sound methods' errors is 0.9 to 1.6."""


class ParityRank:
    """Everything that methods of one shape share: inputs, references, baselines."""

    def __init__(self, case: Case, plugins: Sequence[Path], ranks: Ranks, alone: Ranks) -> None:
        """Prepare a shape.

        Args:
            case: gives the shape; its method does not matter here.
            plugins: method files outside the tree.
            ranks: the ranks that the methods run on.
            alone: this rank alone, for `single`.
        """
        self._case, self._plugins, self._ranks, self._alone = case, plugins, ranks, alone
        draws = range(DRAWS if case.dtype == "bfloat16" else 1)
        self._inputs = [make_inputs(case, ranks.device, draw) for draw in draws]
        self._references: list[dict[str, Tensor]] = [{} for _ in draws]
        """On rank 0, which compares."""
        if ranks.rank == 0:
            self._references = [reference_block(case, inputs) for inputs in self._inputs]
        self._limits = Limits(case, self._baseline)
        self._single: list[float] | None = None

    def verify(self, case: Case, stacks: Sequence[str], peaks: Peaks | None) -> Verification:
        """Run every check of one method.

        Args:
            case: resolved, of the shape given to the constructor.
            stacks: in which to train the whole model, by their names in `STACKS_CHECKED`.
            peaks: of the method, counted before.

        Returns:
            The findings; the verdict is right on rank 0 only.
        """
        try:
            method = registry.load(case.method, case.options, self._plugins)
            method.check(case)
        except Unsupported as error:
            return Verification(
                method=case.method,
                options=case.options,
                shape=Shape.of(case),
                verdict="unsupported",
                reason=str(error),
            )
        found, forward, backward = self._block_checks(case, method)
        found += peak_checks(peaks)
        for stack in stacks:
            found += self._train_checks(case, method, stack)
        failed = [check for check in found if not check.passed]
        return Verification(
            method=case.method,
            options=case.options,
            shape=Shape.of(case),
            verdict="fail" if failed else "pass",
            reason=_describe(failed),
            checks=tuple(found),
            forward_sent=forward,
            backward_sent=backward,
            peaks=peaks,
        )

    def _block_checks(self, case: Case, method: Method) -> tuple[list[Check], dict[str, int], dict[str, int]]:
        self._limits.prepare("block")
        block = Block(case, method, self._ranks)
        found: list[Check] = []
        run, errors = self._compared(block, "plain")
        found += checks.against_reference(errors, self._limits)
        found += checks.causality(block, self._inputs[0])
        found += checks.against_permuted(block, self._inputs[0], run, self._limits)
        _, errors = self._compared(block, "attention saved")
        found += checks.against_reference(errors, self._limits, "attention saved")
        again, errors = self._compared(block, "checkpoint")
        found += checks.against_reference(errors, self._limits, "checkpoint")
        bytes_sent, forward, backward = checks.sent(block, again)
        return found + bytes_sent, forward, backward

    def _compared(self, block: Block, surroundings: Surroundings) -> tuple[BlockRun, dict[str, float]]:
        """The run on the first inputs, and the errors over all: root mean squares, empty on all ranks but 0."""
        runs = [block.run(inputs, surroundings) for inputs in self._inputs]
        drawn = [
            {name: relative_error(run.tensors[name], wanted) for name, wanted in reference.items()}
            for run, reference in zip(runs, self._references, strict=True)
        ]
        return runs[0], {name: _root_mean_square([errors[name] for errors in drawn]) for name in drawn[0]}

    def _train_checks(self, case: Case, method: Method, stack: str) -> list[Check]:
        self._limits.prepare(stack)
        ours = train.train(train.in_stack(case, STACKS_CHECKED[stack]), method, self._ranks)
        if self._ranks.rank:
            return []
        return train.against_single(ours, self._reference_training(), stack, self._limits)

    def _reference_training(self) -> list[float]:
        """Losses and gradient norms of `single`; on rank 0, while the others go on to the next collective."""
        if self._single is None:
            self._single = train.train_single(self._case, self._alone)
        return self._single

    def _baseline(self, where: str) -> dict[str, float]:
        """Errors of the baseline method in the block, or in a stack, by quantity; empty on all ranks but 0."""
        for name in _BASELINES:
            ranks = self._alone if name == "single" else self._ranks
            case = self._case.model_copy(update={"method": name, "options": {}, "world_size": ranks.size})
            method = registry.load(name, {})
            try:
                method.check(case)
            except Unsupported:
                continue
            if name == "single" and self._ranks.rank:
                return {}
            return self._errors(case, method, ranks, where)
        raise AssertionError("single runs every shape on one rank")

    def _errors(self, case: Case, method: Method, ranks: Ranks, where: str) -> dict[str, float]:
        if where == "block":
            return self._compared(Block(case, method, ranks), "plain")[1]
        ours = train.train(train.in_stack(case, STACKS_CHECKED[where]), method, ranks)
        if self._ranks.rank:
            return {}
        return {str(kind): error for kind, error in train.errors(ours, self._reference_training()).items()}


def _root_mean_square(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def _describe(failed: Sequence[Check]) -> str | None:
    """Failed checks in words, the first few of them."""
    words = []
    for check in failed[:_DESCRIBED]:
        error = "not finite" if check.error is None else f"{check.error:.2e}"
        detail = f" ({check.detail})" if check.detail else ""
        words.append(f"{check.name}: error {error} above {check.limit:.2e}{detail}")
    more = len(failed) - len(words)
    return "; ".join(words + ([f"and {more} more"] if more else [])) or None
