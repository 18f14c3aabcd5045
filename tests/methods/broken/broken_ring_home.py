"""A planted fault: the ring's dK/dV travel one hop too far, so each rank keeps those of its neighbour."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.attention_block import attention_block
from cpbench.runtime.collectives import ring_pass
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.ring_attention import RingAttention
from cpbench.runtime.ulysses_core import UlyssesCore
from methods.usp import Usp


@dataclass(frozen=True, slots=True)
class _BrokenRing(RingAttention):
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = RingAttention.backward(self, dout, q, k, v, out, lse)
        dk, dv = ring_pass((dk.contiguous(), dv.contiguous()), self.group).wait()
        return dq, dk, dv


@dataclass(frozen=True, slots=True)
class _BrokenCore(UlyssesCore):
    @property
    def ring(self) -> RingAttention:
        return _BrokenRing(self.ctx.kernels, self.ctx.ring, self.ctx.scale, zigzag=True)


@dataclass(frozen=True, kw_only=True)
class BrokenRingHome(Usp):
    """USP on a 2 x 2 mesh whose K/V gradients belong to another rank."""

    ring_degree: int = 2

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """See `cpbench.method.Method.attention`."""
        return attention_block(x, weights, ctx, _BrokenCore(ctx))


METHOD = BrokenRingHome
