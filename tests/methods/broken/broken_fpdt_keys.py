"""A planted fault: keys get no gradient from the queries of later chunks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.kernels import Kernels
from methods.fpdt import Fpdt


@dataclass(frozen=True, slots=True)
class _NoKeyGradient(Kernels):
    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = Kernels.backward(self, dout, q, k, v, out, lse, causal=causal, scale=scale)
        return dq, dk if causal else torch.zeros_like(dk), dv


@dataclass(frozen=True, kw_only=True)
class BrokenFpdtKeys(Fpdt):
    """FPDT in two chunks that forgets the gradients of a pair's keys."""

    chunk_tokens: int = 52

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """See `cpbench.method.Method.attention`."""
        faulty = replace(ctx, kernels=_NoKeyGradient(ctx.kernels.name))
        return Fpdt.attention(self, x, weights, faulty)


METHOD = BrokenFpdtKeys
