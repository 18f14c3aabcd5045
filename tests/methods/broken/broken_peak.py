"""A planted fault: a copy of q stays alive to the end; every value is right, and every byte sent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.attention_block import Produce, Saved, attention_block
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.ulysses_core import UlyssesCore
from methods.ulysses import Ulysses


@dataclass(frozen=True, slots=True)
class _BrokenCore(UlyssesCore):
    def inputs(self, produce: Produce, saved: Saved) -> None:
        UlyssesCore.inputs(self, produce, saved)
        saved["forgotten"] = saved["q"].clone()


@dataclass(frozen=True, kw_only=True)
class BrokenPeak(Ulysses):
    """Ulysses that holds more than its closed form says."""

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """See `cpbench.method.Method.attention`."""
        return attention_block(x, weights, ctx, _BrokenCore(ctx))


METHOD = BrokenPeak
