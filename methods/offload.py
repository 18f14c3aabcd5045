"""Offload: Ulysses whose saved activations wait in host memory and are brought back, instead of being recomputed.

Source: the saved-tensor offloading of Megatron-LM and torchtune, with Ulysses (arXiv 2309.14509, section 3.1) inside.
k, v, q, lse and out stream to pinned memory in the first forward, beside the attention kernel and the output
projection; the recomputation of a checkpointed block then is the output projection alone.
Communication: as Ulysses; nothing again in the recomputation.
Memory: on the device as Ulysses inside the block and nothing between forward and backward; on the host 2M + 2K' + L a
    block (M, K', L the bytes of q, of k with its copies, and of the log-sum-exp).
Limits: as Ulysses; host memory for every block.
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
class Offload:
    """Ulysses without recomputation of attention."""

    prefetch: bool = True
    """Bring everything back as soon as the block's backward pass begins, so that loads run beside compute: in a
    checkpointed block beside the MLP's backward, which then has 2M + 2K' + L less; without checkpointing beside the
    output projection's.  The default, because the block's own peak, which comes later, does not grow; turn it off where
    the MLP's backward is the step's peak (an untiled MLP), at the price of waiting for each load."""

    def check(self, case: Case) -> None:
        """Refuse heads or lengths that do not divide."""
        heads, ranks = case.architecture.num_heads, case.world_size
        if heads % ranks:
            allowed = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise Unsupported(
                f"offload: num_heads={heads} is not divisible by world_size={ranks}; "
                f"use a world size of {', '.join(allowed)}, or method ring"
            )
        if case.seq_len % ranks:
            raise Unsupported(
                f"offload: seq_len={case.seq_len} is not divisible by world_size={ranks}; "
                f"use a multiple of {ranks}, for example {max(ranks, case.seq_len // ranks * ranks)}"
            )

    def layout(self, case: Case, rank: int) -> Layout:
        """One contiguous block a rank."""
        segments = contiguous_segments(case.seq_len, case.world_size, rank)
        return Layout(ulysses_degree=case.world_size, ring_degree=1, segments=segments)

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """Ulysses attention that keeps nothing on the device; see `cpbench.method.Method.attention`."""
        return attention_block(x, weights, ctx, UlyssesCore(ctx), keep="host", prefetch=self.prefetch)

    def costs(self, case: Case) -> Costs:
        """As Ulysses: 2M + 2K' sent forward, 3M + 2K' backward, times (C-1)/C; nothing in the recomputation.

        The peaks are those of Ulysses, because both lie in the kernels: forward q, k, v, out, lse, 2M + 2K' + L (what
        leaves for the host does so while the kernel reads it); backward q, k, v, out, dout, lse, dq, dk, dv,
        4M + 4K' + L + A, whether the first five were fetched early or late.
        """
        return core_costs(case, ring_degree=1)


METHOD = Offload
VERIFY_OPTIONS = ({"prefetch": False},)
