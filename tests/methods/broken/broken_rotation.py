"""A planted fault: RoPE by local instead of global positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.rope import Rope
from methods.ulysses import Ulysses


@dataclass(frozen=True, kw_only=True)
class BrokenRotation(Ulysses):
    """Ulysses that rotates every rank's tokens as if they came first."""

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """See `cpbench.method.Method.attention`."""
        local = replace(ctx, rope=Rope(((0, x.shape[1]),), ctx.rope.theta))
        return Ulysses.attention(self, x, weights, local)


METHOD = BrokenRotation
