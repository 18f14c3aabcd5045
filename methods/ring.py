"""Ring (Liu et al., 2023): K/V blocks travel around the ranks while each attends with its own queries.

Source: arXiv 2310.01889, section 3; zigzag balance as in zhuzilin/ring-flash-attention.
Communication: forward K/V (R-1 hops); backward K/V again, and dK/dV in float32 (R hops).
Memory: own q, out, dout; two K/V blocks, one in use and one arriving; out (forward) and dq (backward) in float32, and a
    part of each; dK/dV in float32 twice, one sent and one arriving.
Limits: s divisible by 2 R (zigzag) or R (contiguous); any number of heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cpbench.case import Case
from cpbench.errors import Unsupported, UsageError
from cpbench.method import AttentionWeights, Costs, Layout, contiguous_segments, zigzag_segments
from cpbench.runtime.attention_block import attention_block
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.costs import core_costs
from cpbench.runtime.ulysses_core import UlyssesCore


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
        return attention_block(x, weights, ctx, UlyssesCore(ctx, self.zigzag))

    def costs(self, case: Case) -> Costs:
        """Closed forms for R ranks; M, K, L the bytes of q, of k and of lse, n = s/R tokens; f = 4 / bytes per element.

        Forward sends K and V on R-1 hops: 2K (R-1).  Backward sends them again, and dK, dV in float32 on R hops:
        2K (R-1) + 2 f K R.  Peaks, for R > 2 and where no other moment of `core_costs` is larger: forward q, two
        blocks of K/V, out in float32 and a part of it, (2+f)M + 4K + 2L; backward, with A the kernel's scratch, q, out,
        dout, dq in float32 and a part of it, two blocks of K/V, a block's dK/dV, and their float32 sums twice:
        (4+f)M + 5K + 4fK + L + A with zigzag (a block's keys are a half), one K more when contiguous.
        """
        return core_costs(case, ring_degree=case.world_size, zigzag=self.zigzag)


METHOD = Ring
VERIFY_OPTIONS = ({"layout_order": "contiguous"},)
