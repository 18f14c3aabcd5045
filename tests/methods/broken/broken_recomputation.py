"""A planted fault: the recomputation of a checkpointed block rotates by local positions; a plain block is right."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.rope import Rope
from methods.ulysses import Ulysses


@dataclass(frozen=True, kw_only=True)
class BrokenRecomputation(Ulysses):
    """Ulysses that is another function the second time."""

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """See `cpbench.method.Method.attention`."""
        if ctx.memo is not None and ctx.memo.recomputing:
            ctx = replace(ctx, rope=Rope(((0, x.shape[1]),), ctx.rope.theta))
        return Ulysses.attention(self, x, weights, ctx)


METHOD = BrokenRecomputation
