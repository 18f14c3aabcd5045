"""A planted fault: queries travel round the ring, but what they find is merged where they are (a published defect)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.attention_block import attention_block
from cpbench.runtime.collectives import ring_pass
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.ring_attention import RingAttention
from cpbench.runtime.ulysses_core import UlyssesCore
from methods.ring import Ring


@dataclass(frozen=True, slots=True)
class _QueriesTravel(RingAttention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = self.kernels.forward(q, k, v, causal=True, scale=self.scale)
        for step in range(1, self.group.size):
            (q,) = ring_pass((q.contiguous(),), self.group).wait()
            if step <= self.group.rank:  # queries of an earlier rank: these keys are their future
                continue
            part, part_lse = self.kernels.forward(q, k, v, causal=False, scale=self.scale)
            total = torch.logaddexp(lse, part_lse)
            out = out * _weight(lse - total) + part * _weight(part_lse - total)
            lse = total
        return out.to(q.dtype), lse


def _weight(difference: Tensor) -> Tensor:
    return difference.exp().transpose(1, 2).unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class _BrokenCore(UlyssesCore):
    @property
    def ring(self) -> RingAttention:
        return _QueriesTravel(self.ctx.kernels, self.ctx.ring, self.ctx.scale, self.zigzag)


@dataclass(frozen=True, kw_only=True)
class BrokenRing(Ring):
    """Ring attention that gives a rank what belongs to another."""

    layout_order: str = "contiguous"

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """See `cpbench.method.Method.attention`."""
        return attention_block(x, weights, ctx, _BrokenCore(ctx, zigzag=False))


METHOD = BrokenRing
