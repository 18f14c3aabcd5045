"""A planted fault: angles of RoPE in the compute dtype; right in float32, off by tenths of a radian in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.rope import Rope
from methods.ulysses import Ulysses


@dataclass(frozen=True, slots=True)
class _CoarseRope(Rope):
    def rotate_(self, t: Tensor, *, inverse: bool = False) -> Tensor:
        if t.dtype == torch.float32:
            return Rope.rotate_(self, t, inverse=inverse)
        half = t.shape[-1] // 2
        frequency = self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        position = torch.cat([torch.arange(start, stop) for start, stop in self.segments])
        angle = torch.outer(position.to(t.dtype), frequency.to(t.dtype)).float()[:, None]
        first, second = t.float().split(half, dim=-1)
        sin = -angle.sin() if inverse else angle.sin()
        return t.copy_(
            torch.cat([first * angle.cos() - second * sin, second * angle.cos() + first * sin], -1)
        )


@dataclass(frozen=True, kw_only=True)
class BrokenPrecision(Ulysses):
    """Ulysses whose positions have the eight bits of a bfloat16."""

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """See `cpbench.method.Method.attention`."""
        coarse = replace(ctx, rope=_CoarseRope(ctx.rope.segments, ctx.rope.theta))
        return Ulysses.attention(self, x, weights, coarse)


METHOD = BrokenPrecision
