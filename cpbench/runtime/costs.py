"""Closed forms of what one attention block sends and holds, and the byte counts they are written in."""

from __future__ import annotations

from dataclasses import dataclass

from cpbench.case import Case
from cpbench.method import Costs
from cpbench.runtime.kv_replication import replicas
from cpbench.runtime.ring_costs import RingShape


@dataclass(frozen=True, slots=True)
class HeadBytes:
    """Bytes of tensors over `tokens` tokens with all heads, in the case's dtype."""

    q: int
    """All query heads, M = b tokens H e bytes-per-element."""
    kv: int
    """All KV heads, K = M Hkv / H."""
    element: int
    """Bytes of one element."""

    @classmethod
    def of(cls, case: Case, *, tokens: int) -> HeadBytes:
        """Return the sizes for a number of tokens (local or global) of every sequence in the batch."""
        a, element = case.architecture, case.element_bytes
        rows = case.batch_size * tokens
        return cls(
            q=rows * a.attention_dim * element,
            kv=rows * a.kv_dim * element,
            element=element,
        )


def sent(size: int, ranks: int) -> int:
    """Bytes one rank sends to others in an all-to-all of `size` bytes over `ranks` ranks."""
    return size * (ranks - 1) // ranks


def core_costs(case: Case, *, ring_degree: int, zigzag: bool = True) -> Costs:
    """Return the costs of a block around `cpbench.runtime.ulysses_core.UlyssesCore` on C x R = W ranks.

    Bytes, all of one rank: M a tensor of all query heads of n = s/W tokens, as large as one of H/C heads of s/R
    tokens; K the same of all copies of the KV heads; L the float32 log-sum-exp; f = 4 / bytes of an element, so f M is
    M in float32; A what the attention kernel allocates inside.

    Sent.  An all-to-all of B bytes over C ranks sends B (C-1)/C.  Forward exchanges q, k, v, out: 2M + 2K.  Backward
    exchanges out, dout, dq, dk, dv: 3M + 2K.  The ring passes K, V on R-1 hops in each direction, 2K (R-1), and dK, dV
    in float32 on R hops, 2 f K R.

    Forward peak.  k and v wait in head layout while q is exchanged, packed and received: 2M + 2K.  Without a ring the
    kernel's moment is no smaller: q, k, v, out and lse, **2M + 2K + L + A**.  q, k, v are gone when out is exchanged.
    With a ring the larger of its first step and its later ones, `RingShape.forward_bytes`; rounding out at the end, or
    making its float32 copy at the start, holds no more: (1+f)M + L without q or K/V, (2+f)M + 2K + L.

    Backward peak.  The recomputation leaves q, k, v, out, lse: 2M + 2K + L.  Exchanges come before the kernel: dout's
    while q, k, v, lse, out are there, 4M + 2K + L.  Without a ring the kernel's moment is the peak: q, k, v, out, dout,
    lse and dq, dk, dv, **4M + 4K + L + A**.  With a ring, `RingShape.backward_bytes`: that of the rank that needs most.

    With everything in host memory (`keep="host"`) the moments are the same: k, v, q leave while the kernel reads them,
    and are all back, or fetched, when the backward kernel runs.
    """
    r = ring_degree
    c = case.world_size // r
    a, size = case.architecture, HeadBytes.of(case, tokens=case.tokens_per_rank)
    copies = replicas(a.num_kv_heads, c)
    m, k, f = size.q, size.kv * copies, 4 // size.element
    forward: dict[str, int] = {}
    backward: dict[str, int] = {}
    if c > 1:
        forward["all_to_all"] = 2 * sent(m, c) + 2 * sent(k, c)
        backward["all_to_all"] = 3 * sent(m, c) + 2 * sent(k, c)
    if r > 1:
        forward["send"] = 2 * k * (r - 1)
        backward["send"] = forward["send"] + 2 * f * k * r
    ring = RingShape.of(
        case, ring_degree=r, heads=a.num_heads // c, kv_heads=a.num_kv_heads * copies // c, zigzag=zigzag
    )
    return Costs(
        forward_collective_bytes=forward,
        backward_collective_bytes=backward,
        forward_peak_bytes=max(2 * m + 2 * k if c > 1 else 0, ring.forward_bytes()),
        backward_peak_bytes=ring.backward_bytes(),
    )
