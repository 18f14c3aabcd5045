"""Ring (Liu et al., 2023): K/V blocks travel around the ranks while each attends with its own queries.

Source: arXiv 2310.01889, section 3; zigzag balance as in zhuzilin/ring-flash-attention.
Communication: forward K/V (R-1 hops); backward K/V again, and dK/dV in float32 (R hops).
Memory: own q, k, v, out; two travelling K/V blocks; float32 accumulators of out (forward), dq and dK/dV (backward).
Limits: s divisible by 2 R (zigzag) or R (contiguous); any number of heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cpbench.case import Case
from cpbench.errors import Unsupported, UsageError
from cpbench.method import AttentionWeights, Costs, Layout, contiguous_segments, zigzag_segments
from cpbench.runtime.attention_block import Produce, Saved, Take, attention_block
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.costs import HeadBytes
from cpbench.runtime.ring_attention import RingAttention


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """All ranks form one ring."""

    layout_order: str = "zigzag"
    """zigzag: chunks r and 2R-1-r of 2R, equal causal work; contiguous: one block, late ranks work more."""

    def __post_init__(self) -> None:
        """Refuse an unknown order."""
        if self.layout_order not in ("zigzag", "contiguous"):
            raise UsageError(f"ring.layout_order={self.layout_order!r} is not one of zigzag, contiguous")

    @property
    def zigzag(self) -> bool:
        """Whether a rank holds an early and a late chunk."""
        return self.layout_order == "zigzag"

    def check(self, case: Case) -> None:
        """Refuse lengths that do not divide."""
        parts = case.world_size * (2 if self.zigzag and case.world_size > 1 else 1)
        if case.seq_len % parts:
            near = max(parts, case.seq_len // parts * parts)
            raise Unsupported(
                f"ring: seq_len={case.seq_len} is not divisible by {parts} "
                f"({'2 x ' if self.zigzag else ''}world_size={case.world_size}); use a multiple, for example {near}"
            )

    def layout(self, case: Case, rank: int) -> Layout:
        """Chunks r and 2R-1-r, or one contiguous block."""
        if self.zigzag and case.world_size > 1:
            segments: tuple[tuple[int, int], ...] = zigzag_segments(case.seq_len, case.world_size, rank)
        else:
            segments = contiguous_segments(case.seq_len, case.world_size, rank)
        return Layout(ulysses_degree=1, ring_degree=case.world_size, segments=segments)

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """Ring attention around full-width projections; see `cpbench.method.Method.attention`."""
        return attention_block(x, weights, ctx, _RingCore(ctx, self.zigzag))

    def costs(self, case: Case) -> Costs:
        """Closed forms for R ranks; K the bytes of all KV heads of the local n = s/R tokens; f = 4 / bytes per element.

        Forward sends K and V on R-1 hops: 2K (R-1).  Backward sends them again, and dK, dV in float32 on R hops:
        2K (R-1) + 2 f K R.
        """
        r, size = case.world_size, HeadBytes.of(case, tokens=case.tokens_per_rank)
        if r == 1:
            return Costs()
        forward = 2 * size.kv * (r - 1)
        return Costs(
            forward_collective_bytes={"send": forward},
            backward_collective_bytes={"send": forward + 2 * size.kv * 4 // size.element * r},
        )


METHOD = Ring


@dataclass(frozen=True, slots=True)
class _RingCore:
    ctx: AttentionContext
    zigzag: bool

    def inputs(self, produce: Produce, saved: Saved) -> None:
        saved["v"], saved["k"], saved["q"] = produce("v"), produce("k"), produce("q")

    def attend(self, saved: Saved) -> None:
        saved["out"], saved["lse"] = self._ring().forward(saved["q"], saved["k"], saved["v"])

    def backward(self, saved: Saved, dout: Callable[[], Tensor], take: Take) -> None:
        names = ("q", "k", "v", "out", "lse")
        dq, dk, dv = self._ring().backward(dout(), *(saved.pop(name) for name in names))
        take("q", dq)
        del dq
        take("k", dk)
        del dk
        take("v", dv)

    def _ring(self) -> RingAttention:
        return RingAttention(self.ctx.kernels, self.ctx.ring, self.ctx.scale, self.zigzag)
