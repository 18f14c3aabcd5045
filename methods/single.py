"""Single: no parallelism, the reference every method is compared with.

Source: Vaswani et al. 2017; FlashAttention-2 (Dao, 2023) for the kernel.
Communication: none.
Memory: all heads of all tokens on one rank; q, k, v, out and their gradients at full width.
Limits: world_size 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.method import AttentionWeights, Costs, Layout, contiguous_segments
from cpbench.runtime.attention_block import attention_block
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.costs import core_costs
from cpbench.runtime.ulysses_core import UlyssesCore


@dataclass(frozen=True, kw_only=True, slots=True)
class Single:
    """The whole sequence on one rank."""

    def check(self, case: Case) -> None:
        """Refuse more than one rank."""
        if case.world_size != 1:
            raise Unsupported(
                f"single: world_size={case.world_size} is not 1; use --world 1, or a parallel method such as ulysses"
            )

    def layout(self, case: Case, rank: int) -> Layout:
        """One rank holds every token in order."""
        return Layout(ulysses_degree=1, ring_degree=1, segments=contiguous_segments(case.seq_len, 1, rank))

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """Attention of all heads over all tokens; see `cpbench.method.Method.attention`."""
        return attention_block(x, weights, ctx, UlyssesCore(ctx))

    def costs(self, case: Case) -> Costs:
        """Nothing is sent.

        With M, K the bytes of q and of k, L of the log-sum-exp, A of the kernel's scratch: forward holds at most q, k,
        v, out, lse, 2M + 2K + L; backward q, k, v, out, dout, lse, dq, dk, dv, 4M + 4K + L + A.  See `core_costs`.
        """
        return core_costs(case, ring_degree=1)


METHOD = Single
