"""Ulysses (Jacobs et al., 2023): all-to-all trades sequence for heads, so each rank attends with its own heads.

Source: arXiv 2309.14509, section 3.1.  With fewer KV heads than ranks, K/V are replicated as activations just before
the all-to-all, and dK/dV summed over the replicas after it.
Communication: forward q, k, v and out; backward out, dout, dq, dk, dv.
Memory: q, k, v, out and their gradients at full width over n = s/C tokens; two staging copies in an all-to-all.
Limits: num_heads divisible by the degree C; s divisible by C.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.method import AttentionWeights, Costs, Layout, contiguous_segments
from cpbench.runtime.attention_block import attention_block
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.costs import core_costs
from cpbench.runtime.ulysses_core import UlyssesCore


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
        return attention_block(x, weights, ctx, UlyssesCore(ctx))

    def costs(self, case: Case) -> Costs:
        """Closed forms for C ranks; M, K' the bytes of all query heads and of all KV copies of n = s/C tokens.

        An all-to-all of B bytes over C ranks sends B (C-1)/C.  Forward moves q, k, v, out: 2M + 2K'.  Backward moves
        out, dout, dq, dk, dv: 3M + 2K'.  Peaks, with L the bytes of lse and A of the kernel's scratch: forward q, k, v,
        out, lse, 2M + 2K' + L; backward q, k, v, out, dout, lse, dq, dk, dv, 4M + 4K' + L + A.  Exchanges stay below:
        see `core_costs`.
        """
        return core_costs(case, ring_degree=1)


METHOD = Ulysses
