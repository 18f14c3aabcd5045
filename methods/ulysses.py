"""Ulysses (Jacobs et al., 2023): all-to-all trades sequence for heads, so each rank attends with its own heads.

Source: arXiv 2309.14509, section 3.1.  With fewer KV heads than ranks, K/V are replicated as activations just before
the all-to-all, and dK/dV summed over the replicas after it.
Communication: forward q, k, v and out; backward out, dout, dq, dk, dv.
Memory: q, k, v, out and their gradients at full width over n = s/C tokens; two staging copies in an all-to-all.
Limits: num_heads divisible by the degree C; s divisible by C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.method import AttentionWeights, Costs, Layout, contiguous_segments
from cpbench.runtime.attention_block import Produce, Saved, Take, attention_block
from cpbench.runtime.collectives import all_to_all_heads, all_to_all_sequence
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.costs import HeadBytes, sent
from cpbench.runtime.kv_replication import replicas, replicate_heads, sum_replicas


@dataclass(frozen=True, kw_only=True, slots=True)
class Ulysses:
    """All ranks exchange heads."""

    def check(self, case: Case) -> None:
        """Refuse heads or lengths that do not divide."""
        heads, ranks = case.architecture.num_heads, case.world_size
        if heads % ranks:
            allowed = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise Unsupported(
                f"ulysses: num_heads={heads} is not divisible by world_size={ranks}; "
                f"use a world size of {', '.join(allowed)}, or method ring"
            )
        if case.seq_len % ranks:
            raise Unsupported(
                f"ulysses: seq_len={case.seq_len} is not divisible by world_size={ranks}; "
                f"use a multiple of {ranks}, for example {max(ranks, case.seq_len // ranks * ranks)}"
            )

    def layout(self, case: Case, rank: int) -> Layout:
        """One contiguous block a rank."""
        segments = contiguous_segments(case.seq_len, case.world_size, rank)
        return Layout(ulysses_degree=case.world_size, ring_degree=1, segments=segments)

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """Attention of H/C heads over the whole sequence; see `cpbench.method.Method.attention`."""
        return attention_block(x, weights, ctx, _UlyssesCore(ctx))

    def costs(self, case: Case) -> Costs:
        """Closed forms for C ranks; M, K' the bytes of all query heads and of all KV copies of n = s/C tokens.

        An all-to-all of B bytes over C ranks sends B (C-1)/C.  Forward moves q, k, v, out: 2M + 2K'.  Backward moves
        out, dout, dq, dk, dv: 3M + 2K'.
        """
        c, size = case.world_size, HeadBytes.of(case, tokens=case.tokens_per_rank)
        kv = size.kv * replicas(case.architecture.num_kv_heads, c)
        forward = 2 * sent(size.q, c) + 2 * sent(kv, c)
        backward = 3 * sent(size.q, c) + 2 * sent(kv, c)
        return Costs(
            forward_collective_bytes={"all_to_all": forward} if c > 1 else {},
            backward_collective_bytes={"all_to_all": backward} if c > 1 else {},
        )


METHOD = Ulysses


@dataclass(frozen=True, slots=True)
class _UlyssesCore:
    ctx: AttentionContext

    def inputs(self, produce: Produce, saved: Saved) -> None:
        group, recorder = self.ctx.ulysses, self.ctx.recorder
        copies = replicas(self.ctx.case.architecture.num_kv_heads, group.size)
        # One tensor at a time: its source is gone before the next is projected.
        saved["v"] = all_to_all_heads(replicate_heads(produce("v"), copies), group, recorder)
        saved["k"] = all_to_all_heads(replicate_heads(produce("k"), copies), group, recorder)
        saved["q"] = all_to_all_heads(produce("q"), group, recorder)

    def attend(self, saved: Saved) -> None:
        out, saved["lse"] = self.ctx.kernels.forward(
            saved["q"], saved["k"], saved["v"], causal=True, scale=self.ctx.scale
        )
        saved["out"] = all_to_all_sequence(out, self.ctx.ulysses, self.ctx.recorder)

    def backward(self, saved: Saved, dout: Callable[[], Tensor], take: Take) -> None:
        group, recorder = self.ctx.ulysses, self.ctx.recorder
        copies = replicas(self.ctx.case.architecture.num_kv_heads, group.size)
        out = all_to_all_heads(saved.pop("out"), group, recorder)
        dout_heads = all_to_all_heads(dout(), group, recorder)
        dq, dk, dv = self.ctx.kernels.backward(
            dout_heads,
            saved.pop("q"),
            saved.pop("k"),
            saved.pop("v"),
            out,
            saved.pop("lse"),
            causal=True,
            scale=self.ctx.scale,
        )
        del out, dout_heads
        take("q", all_to_all_sequence(dq, group, recorder))
        del dq
        take("k", sum_replicas(all_to_all_sequence(dk, group, recorder), copies))
        del dk
        take("v", sum_replicas(all_to_all_sequence(dv, group, recorder), copies))
