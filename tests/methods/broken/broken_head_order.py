"""A planted fault: a stage's outputs go to the next stage's heads (a wrong GQA order)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.context import AttentionContext
from methods.upipe import UPipe


@dataclass(frozen=True, kw_only=True)
class BrokenHeadOrder(UPipe):
    """UPipe whose output projection sees the heads in schedule order."""

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """See `cpbench.method.Method.attention`."""
        a = ctx.case.architecture
        by_head = weights.wo.unflatten(1, (a.num_kv_heads, a.gqa_ratio, a.head_dim))
        wrong = by_head.transpose(1, 2).flatten(1)
        return UPipe.attention(self, x, replace(weights, wo=wrong), ctx)


METHOD = BrokenHeadOrder
