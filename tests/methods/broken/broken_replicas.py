"""A planted fault: gradients of replicated KV heads are not summed over the replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cpbench.method import AttentionWeights
from cpbench.runtime.attention_block import Saved, Take, attention_block
from cpbench.runtime.collectives import all_to_all_heads, all_to_all_sequence
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.kv_replication import replicas
from methods.ulysses import Ulysses, _UlyssesCore


@dataclass(frozen=True, slots=True)
class _BrokenCore(_UlyssesCore):
    def backward(self, saved: Saved, dout: Callable[[], Tensor], take: Take) -> None:
        group, recorder = self.ctx.ulysses, self.ctx.recorder
        copies = replicas(self.ctx.case.architecture.num_kv_heads, group.size)
        out = all_to_all_heads(saved.pop("out"), group, recorder)
        q, k, v, lse = (saved.pop(name) for name in ("q", "k", "v", "lse"))
        dout_heads = all_to_all_heads(dout(), group, recorder)
        grads = self.ctx.kernels.backward(dout_heads, q, k, v, out, lse, causal=True, scale=self.ctx.scale)
        take("q", all_to_all_sequence(grads[0], group, recorder))
        take("k", all_to_all_sequence(grads[1], group, recorder)[:, :, ::copies].contiguous())
        take("v", all_to_all_sequence(grads[2], group, recorder)[:, :, ::copies].contiguous())


@dataclass(frozen=True, kw_only=True)
class BrokenReplicas(Ulysses):
    """Ulysses that keeps the gradient of the first replica only."""

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """See `cpbench.method.Method.attention`."""
        return attention_block(x, weights, ctx, _BrokenCore(ctx))


METHOD = BrokenReplicas
