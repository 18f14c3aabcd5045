"""A planted fault: gradients of replicated KV heads are not summed over the replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.attention_block import Saved, Take, attention_block
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.projection import Which
from cpbench.runtime.ulysses_core import UlyssesCore
from methods.ulysses import Ulysses


@dataclass(frozen=True, slots=True)
class _BrokenCore(UlyssesCore):
    def backward(self, saved: Saved, dout: Callable[[], Tensor], take: Take) -> None:
        copies = self.copies

        def take_first(which: Which, grad: Tensor) -> None:
            take(which, grad if which == "q" else grad[:, :, ::copies].contiguous())

        UlyssesCore.backward(_Unsummed(self.ctx), saved, dout, take_first)


@dataclass(frozen=True, slots=True)
class _Unsummed(UlyssesCore):
    @property
    def copies(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class BrokenReplicas(Ulysses):
    """Ulysses that keeps the gradient of the first replica only."""

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """See `cpbench.method.Method.attention`."""
        return attention_block(x, weights, ctx, _BrokenCore(ctx))


METHOD = BrokenReplicas
