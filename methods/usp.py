"""USP (Fang and Zhao, 2024): Ulysses within groups of ranks, a ring across them, on a 2-D mesh.

Source: arXiv 2405.07719.  Rank w is Ulysses rank w % C and ring rank w // C.  Tokens are in zigzag order over the ring
and contiguous over the Ulysses group, so that after the all-to-all a ring rank holds its early chunk, then its late
one; a zigzag over all ranks would let tokens see their future.
Communication: within the group as Ulysses (q, k, v, out; out, dout, dq, dk, dv); along the ring K/V of the local heads
    (R-1 hops in each direction) and dK/dV in float32 (R hops).
Memory: as ring, with tensors of H/C heads over s/R tokens, which are as large as those of all heads over s/W.
Limits: num_heads divisible by the Ulysses degree C = W/R; s divisible by W (by 2W for R above 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cpbench.case import Case
from cpbench.errors import Unsupported, UsageError
from cpbench.method import AttentionWeights, Costs, Layout, hybrid_segments
from cpbench.runtime.attention_block import attention_block
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.costs import core_costs
from cpbench.runtime.ulysses_core import UlyssesCore


@dataclass(frozen=True, kw_only=True, slots=True)
class Usp:
    """Ulysses x ring."""

    ring_degree: int = 0
    """Ring ranks R; the Ulysses degree is world_size / R.  0: the smallest R whose Ulysses degree divides the heads."""

    def __post_init__(self) -> None:
        """Refuse negative degrees."""
        if self.ring_degree < 0:
            raise UsageError(
                f"usp.ring_degree={self.ring_degree} is negative; use 0 for the smallest that fits the heads"
            )

    def check(self, case: Case) -> None:
        """Refuse degrees, heads and lengths that do not divide."""
        heads, ranks, ring = case.architecture.num_heads, case.world_size, self.degree(case)
        if ranks % ring:
            raise Unsupported(
                f"usp: ring_degree={ring} does not divide world_size={ranks}; choose one that does"
            )
        if heads % (ranks // ring):
            fits = [str(r) for r in range(1, ranks + 1) if ranks % r == 0 and heads % (ranks // r) == 0]
            raise Unsupported(
                f"usp: num_heads={heads} is not divisible by the Ulysses degree {ranks // ring}; "
                f"set usp.ring_degree to one of {', '.join(fits)}"
            )
        parts = ranks * (2 if ring > 1 else 1)
        if case.seq_len % parts:
            raise Unsupported(
                f"usp: seq_len={case.seq_len} is not divisible by {parts}; "
                f"use a multiple, for example {max(parts, case.seq_len // parts * parts)}"
            )

    def layout(self, case: Case, rank: int) -> Layout:
        """Zigzag over the ring, contiguous over the Ulysses group."""
        ring = self.degree(case)
        degree = case.world_size // ring
        segments = hybrid_segments(case.seq_len, degree, ring, rank)
        return Layout(ulysses_degree=degree, ring_degree=ring, segments=segments)

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """Attention of H/C heads around a ring of R; see `cpbench.method.Method.attention`."""
        return attention_block(x, weights, ctx, UlyssesCore(ctx))

    def costs(self, case: Case) -> Costs:
        """Closed forms; M, K' the bytes of q and of all KV copies of n = s/W tokens, f = 4 / bytes per element.

        All-to-all over C ranks as Ulysses: 2M + 2K' forward, 3M + 2K' backward, times (C-1)/C.  Around R ranks:
        2K' (R-1) forward, 2K' (R-1) + 2 f K' R backward.  Peaks are those of a ring of R whose tensors are in head
        layout, and as large: see `core_costs`.
        """
        return core_costs(case, ring_degree=self.degree(case))

    def degree(self, case: Case) -> int:
        """Return the ring degree of a case."""
        heads, ranks = case.architecture.num_heads, case.world_size
        fits = (r for r in range(1, ranks + 1) if ranks % r == 0 and heads % (ranks // r) == 0)
        return self.ring_degree or next(fits)


METHOD = Usp
VERIFY_OPTIONS = ({"ring_degree": 2}, {"ring_degree": 4})
PLAN_OPTIONS = ({"ring_degree": 2}, {"ring_degree": 4})
