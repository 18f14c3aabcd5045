"""Single: no parallelism, the reference every method is compared with.

Source: Vaswani et al. 2017; FlashAttention-2 (Dao, 2023) for the kernel.
Communication: none.
Memory: all heads of all tokens on one rank; q, k, v, out and their gradients at full width.
Limits: world_size 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.method import AttentionWeights, Costs, Layout, contiguous_segments
from cpbench.runtime.attention_block import Produce, Saved, Take, attention_block
from cpbench.runtime.context import AttentionContext


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
        return attention_block(x, weights, ctx, _SingleCore(ctx))

    def costs(self, case: Case) -> Costs:
        """Nothing is sent."""
        return Costs()


METHOD = Single


@dataclass(frozen=True, slots=True)
class _SingleCore:
    ctx: AttentionContext

    def inputs(self, produce: Produce, saved: Saved) -> None:
        saved["v"], saved["k"], saved["q"] = produce("v"), produce("k"), produce("q")

    def attend(self, saved: Saved) -> None:
        saved["out"], saved["lse"] = self.ctx.kernels.forward(
            saved["q"], saved["k"], saved["v"], causal=True, scale=self.ctx.scale
        )

    def backward(self, saved: Saved, dout: Callable[[], Tensor], take: Take) -> None:
        names = ("q", "k", "v", "out", "lse")
        dq, dk, dv = self.ctx.kernels.backward(
            dout(), *(saved.pop(name) for name in names), causal=True, scale=self.ctx.scale
        )
        take("q", dq)
        take("k", dk)
        take("v", dv)
