"""The peaks of a block at a long length, counted over fake tensors, against those that `costs` states.

Tiles of fixed size are left out of `costs`, so a block is counted where they are far below the limit of 1 %: at 1Mi
tokens a rank, or 128Ki where a method takes too many operators for about a second, and with heads wide enough for the
smaller peak to be 4 GiB (a method may hold no more than chunks of fixed size).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from cpbench.block_count import BlockCount, count_block
from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.method import Method, representative_ranks
from cpbench.runtime.costs import HeadBytes
from cpbench.verification import Check, Peaks

LIMIT = 0.01
LENGTHS = ((2**20, 5_000), (2**17, 28_000))
"""Tokens a rank, and the most operators that a rank's block may take there."""

_LARGE_BYTES = 2**32


def count_peaks(case: Case, method: Method) -> Peaks | None:
    """Return the peaks of a case's block at a long length, or None where nothing can be counted.

    Must not be called while a process group exists, because the block runs in a fake one.
    """
    for tokens, operators in LENGTHS:
        long = case.model_copy(update={"seq_len": tokens * case.world_size})
        try:
            method.check(long)
            peaks = _peaks(long, method, operators)
            smaller = min(peaks.forward_bytes, peaks.backward_bytes)
            if 0 < smaller < _LARGE_BYTES and case.device == "cpu":  # CUDA's kernels take no such heads
                peaks = _peaks(_widened(long, -(-_LARGE_BYTES // smaller)), method, 2 * operators)
        except (_TooLongError, Unsupported):
            continue
        return peaks
    return None


def _widened(case: Case, factor: int) -> Case:
    a = case.architecture
    return case.model_copy(update={"architecture": a.model_copy(update={"head_dim": factor * a.head_dim})})


def _count(case: Case, method: Method, rank: int, operators: int) -> BlockCount:
    with _Budget(operators):
        return count_block(case, method, rank=rank)


def peak_checks(peaks: Peaks | None) -> list[Check]:
    """Compare counted and stated peaks; a peak that is not stated is not checked."""
    if peaks is None:
        return []
    pairs = (
        ("peak (forward)", peaks.forward_bytes, peaks.stated_forward_bytes),
        ("peak (backward)", peaks.backward_bytes, peaks.stated_backward_bytes),
    )
    return [_check(name, counted, stated) for name, counted, stated in pairs if stated]


def _check(name: str, counted: int, stated: int) -> Check:
    error = abs(counted - stated) / max(counted, 1)
    detail = f"counted {counted} bytes, costs state {stated}"
    return Check(
        kind="peaks",
        name=name,
        error=error,
        limit=LIMIT,
        passed=error <= LIMIT,
        detail=None if error <= LIMIT else detail,
    )


def _peaks(case: Case, method: Method, operators: int) -> Peaks:
    # Rank 0 and the last, which under a causal mask differ most, and what does the work of both.
    ranks = {0, case.world_size - 1, *representative_ranks(partial(method.layout, case))}
    counts = [_count(case, method, rank, operators) for rank in sorted(ranks)]
    costs = method.costs(case)
    return Peaks(
        tokens_per_rank=case.tokens_per_rank,
        head_dim=case.architecture.head_dim,
        unit_bytes=HeadBytes.of(case, tokens=case.tokens_per_rank).q,
        forward_bytes=max(count.forward_peak_bytes for count in counts),
        backward_bytes=max(count.backward_peak_bytes for count in counts),
        host_bytes=max(count.host_bytes for count in counts),
        stated_forward_bytes=costs.forward_peak_bytes,
        stated_backward_bytes=costs.backward_peak_bytes,
    )


class _TooLongError(Exception):
    """More operators than allowed."""


class _Budget(TorchDispatchMode):
    """Ends what runs inside after a number of operators."""

    def __init__(self, operators: int) -> None:
        super().__init__()
        self._left = operators

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's own signature
        types: Any,  # noqa: ANN401 - torch's own signature
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's own signature
        """Count an operator, then run it."""
        self._left -= 1
        if self._left < 0:
            raise _TooLongError
        return func(*args, **(kwargs or {}))
