"""A planted fault: the bias of the values is added, but gets no gradient, so that it never learns."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.context import AttentionContext
from methods.ulysses import Ulysses


@dataclass(frozen=True, kw_only=True)
class BrokenBias(Ulysses):
    """Ulysses whose gradient of a bias is zero."""

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """See `cpbench.method.Method.attention`."""
        bias = weights.bv
        constant = None if bias is None else bias.detach() + 0 * bias
        return Ulysses.attention(self, x, replace(weights, bv=constant), ctx)


METHOD = BrokenBias
