"""PyTorch context_parallel: ring attention as torch ships it, what a user gets without a further library.

Source: torch.distributed.tensor.experimental.context_parallel, torch 2.11 to 2.13.
Communication: forward K/V, by one all-gather (`allgather`) or on R-1 hops (`alltoall`); backward K/V the same way, and
    dK/dV in float32 on R hops.
Memory: q, k, v, out; merged outputs in float32, out of place; all ranks' K/V with `allgather`.
Limits: CUDA, or an estimate for it; bfloat16; at least two ranks; s divisible by 2 R.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from cpbench.case import Case
from cpbench.errors import Unsupported, UsageError
from cpbench.method import AttentionWeights, Costs, Layout, zigzag_segments
from cpbench.runtime.attention_block import attention_block
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.costs import HeadBytes
from cpbench.runtime.kernels import scratch_of, select_kernels
from cpbench.runtime.memo import Memo
from cpbench.runtime.torch_context_parallel import TorchRingCore


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchRing:
    """All ranks form one ring."""

    rotate: str = "allgather"
    """allgather: one all-gather of everyone's K/V, PyTorch's default; alltoall: hop by hop."""

    def __post_init__(self) -> None:
        """Refuse an unknown rotation."""
        if self.rotate not in ("allgather", "alltoall"):
            raise UsageError(f"torch-ring.rotate={self.rotate!r} is not one of allgather, alltoall")

    def check(self, case: Case) -> None:
        """Refuse what PyTorch has no operators for, and lengths that do not divide."""
        if case.device != "cuda":
            raise Unsupported(
                f"torch-ring: context_parallel has no operators for device={case.device}, since torch shards the "
                "attention of CUDA only; use --device cuda, an estimate for CUDA, or method ring"
            )
        if case.world_size == 1:
            raise Unsupported("torch-ring: world_size=1 makes no ring; use method single, or a larger world")
        parts = 2 * case.world_size
        if case.seq_len % parts:
            raise Unsupported(
                f"torch-ring: seq_len={case.seq_len} is not divisible by {parts} (2 x world_size={case.world_size}); "
                f"use a multiple, for example {max(parts, case.seq_len // parts * parts)}"
            )

    def layout(self, case: Case, rank: int) -> Layout:
        """Chunks r and 2R-1-r of 2R: what PyTorch calls head-tail load balancing."""
        segments = zigzag_segments(case.seq_len, case.world_size, rank)
        return Layout(ulysses_degree=1, ring_degree=case.world_size, segments=segments)

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """PyTorch's ring attention around full-width projections; see `cpbench.method.Method.attention`."""
        if ctx.memo is not None:  # its backward needs its own graph, so attention is always recomputed
            ctx = replace(ctx, memo=Memo(ctx.host, recomputing=ctx.memo.recomputing))
        return attention_block(x, weights, ctx, TorchRingCore(ctx, self.rotate))

    def costs(self, case: Case) -> Costs:
        """Closed forms for R ranks; M, K, L the bytes of q, of k and of the log-sum-exp of n = s/R tokens.

        Written for bfloat16, the one dtype that CUDA's kernels take; in float32 (a test on CPU) float32 copies weigh 1
        for 2, and the part of out is its own.

        Forward moves K and V, 2K (R-1), by all-gather or hop by hop (an all-to-all in which each rank sends to one);
        backward the same, and dK, dV in float32 on R hops, 4K R.

        Peaks are at the second step.  The rotation then holds V: 2K R with `allgather`; hop by hop the block in use and
        the one that arrives, 4K (2K for R = 2), and in forward, 6K, the packed one too, which only the exchange holds
        until it is waited for.

        Forward, on the last rank, which attends to half of an arrived block: q, k, v; V; a part of out; four float32
        tensors of its width (the merged output, the part, their difference, that difference weighted); two lse and the
        weight: **10M + 2K + V + 3L**.

        Backward, there: q, k, v, out, dout, lse; V and the packed block that was sent; dq in float32; dK/dV in float32
        as merged, as packed and as they arrive, 12K; the gradients of the first step, M + 2K, which the loop still
        names; those of this one, M + K; the kernel's scratch A over n queries and n/2 keys: **7M + 19K + V + L + A**.
        A rank between the first and the last (R > 2) does the same, but half of its output was merged apart, which left
        out head by head, and ATen copies what is not contiguous token by token: **8M + 19K + V + L + A**.

        The first rank attends with half of its queries to whole blocks, and copies their half of the log-sum-exp:
        **6.5M + 20K + V + 1.5L + A'**, where A' is over n/2 queries and n keys and has such copies: of the half of
        out, M/2, and in a batch of that of dout, M/2.  When half of dq is updated afterwards, out of place, A', the
        copies and the gradients of the first step are gone, and dq is there twice: **7.5M + 18K + V + 1.5L**, which is
        more only where A' is small, as on CPU.
        """
        r, a, size = case.world_size, case.architecture, HeadBytes.of(case, tokens=case.tokens_per_rank)
        m, k, n, f = size.q, size.kv, case.tokens_per_rank, 4 // size.element
        lse = 4 * case.batch_size * n * a.num_heads
        rotation = "all_gather" if self.rotate == "allgather" else "all_to_all"
        forward = {rotation: 2 * k * (r - 1)}
        backward = dict(forward)
        backward["all_to_all"] = backward.get("all_to_all", 0) + 2 * f * k * r
        gathered = 2 * k * r if self.rotate == "allgather" else 0
        held = gathered or (4 * k if r > 2 else 2 * k)
        held_forward = gathered or (6 * k if r > 2 else 2 * k)

        def scratch(queries: int, keys: int) -> int:
            q_shape = (case.batch_size, queries, a.num_heads, a.head_dim)
            k_shape = (case.batch_size, keys, a.num_kv_heads, a.head_dim)
            return scratch_of(select_kernels(case).name, q_shape, k_shape, size.element, backward=True)

        out_copied = m if case.device == "cuda" else 0
        copied = out_copied // 2 + (m // 2 if case.batch_size > 1 else 0)
        sums = f * m + 6 * f * k  # dq, and three times dK/dV
        last = 5 * m + 7 * k + sums + scratch(n, n // 2)
        between = last + (out_copied if r > 2 else 0)
        first = 4 * m + m // 2 + 8 * k + sums + scratch(n // 2, n) + copied + lse // 2
        update = 3 * m + m // 2 + 6 * k + sums + f * m + lse // 2
        return Costs(
            forward_collective_bytes=forward,
            backward_collective_bytes=backward,
            forward_peak_bytes=(1 + 4 * f) * m + (m if f > 1 else 0) + 2 * k + held_forward + 3 * lse,
            backward_peak_bytes=max(first, update, between) + held + lse,
        )


METHOD = TorchRing
VERIFY_OPTIONS = ({"rotate": "alltoall"},)
PLAN_OPTIONS = ({"rotate": "alltoall"},)
