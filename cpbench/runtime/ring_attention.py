"""Ring attention over a group: K/V travel from rank to rank while every rank attends with its own queries.

Source: Liu et al. 2023 (Ring Attention); the zigzag balance is that of zhuzilin/ring-flash-attention; the merge of
blocks is the log-sum-exp form of Milakov and Gimelshein 2018.

Forward: K/V move to the next rank while the current block is computed; partial outputs merge in float32, in place,
tile by tile.  Backward: K/V travel again; dK/dV travel with them in float32, one hop behind, and are home after R
hops; dQ accumulates in float32.  In a ring of one nothing is sent, copied or merged.

Which parts of q and k meet (`_block`): with zigzag, the local tokens are [early half | late half]; with K/V of an
earlier ring rank all queries meet its early half, with K/V of a later one only late queries meet all of it.  With
contiguous blocks all queries meet all keys of an earlier rank and nothing of a later one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpbench.runtime.collectives import Group, RingPass, ring_pass
from cpbench.runtime.kernels import Kernels
from cpbench.runtime.tiles import tiles

_TILE_ELEMENTS = 2**21  # rows of a merge tile are chosen so that its float32 temporaries stay at 8 MiB


@dataclass(frozen=True, slots=True)
class RingAttention:
    """Causal attention of `[b, n, h, e]` queries with the keys of a whole ring."""

    kernels: Kernels
    group: Group
    scale: float
    zigzag: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out `[b, n, h, e]` in q's dtype, lse `[b, h, n]` float32)."""
        out: Tensor | None = None
        lse: Tensor | None = None
        hop: RingPass | None = None
        spare: tuple[Tensor, ...] | None = None
        own: tuple[Tensor, ...] = (k, v)
        kv = own
        for step in range(self.group.size):
            if step + 1 < self.group.size:
                hop = ring_pass(kv, self.group, into=spare)
            block = self._block(step, q.shape[1])
            if block is not None:
                rows, keys = block
                part, part_lse = self.kernels.forward(
                    q[:, rows], kv[0][:, keys], kv[1][:, keys], causal=step == 0, scale=self.scale
                )
                if out is None or lse is None:  # step 0: every query meets its own keys
                    out, lse = (part if self.group.size == 1 else part.float()), part_lse
                else:
                    _merge_(out[:, rows], lse[:, :, rows], part, part_lse)
                del part, part_lse
            if hop is not None:
                spare = kv if kv is not own else None
                kv, hop = hop.wait(), None
        if out is None or lse is None:
            raise AssertionError("a ring has at least one rank")
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) of this rank's tokens, in q's dtype."""
        if self.group.size == 1:
            return self.kernels.backward(dout, q, k, v, out, lse, causal=True, scale=self.scale)
        dq = torch.zeros_like(q, dtype=torch.float32)
        own: tuple[Tensor, ...] = (k, v)
        kv = own
        hop: RingPass | None = None
        spare: tuple[Tensor, ...] | None = None
        dkv: tuple[Tensor, ...] = ()
        dkv_hop: RingPass | None = None
        for step in range(self.group.size):
            if step + 1 < self.group.size:
                hop = ring_pass(kv, self.group, into=spare)
            block = self._block(step, q.shape[1])
            grads: tuple[Tensor, Tensor] | None = None
            if block is not None:
                rows, keys = block
                part_dq, *grads_kv = self.kernels.backward(
                    dout[:, rows],
                    q[:, rows],
                    kv[0][:, keys],
                    kv[1][:, keys],
                    out[:, rows],
                    lse[:, :, rows],
                    causal=step == 0,
                    scale=self.scale,
                )
                dq[:, rows] += part_dq
                grads = (grads_kv[0], grads_kv[1])
                del part_dq, grads_kv
            if dkv_hop is not None:
                dkv = dkv_hop.wait()
            if step == 0 and grads is not None:
                dkv = tuple(g.float().contiguous() for g in grads)
            elif block is not None and grads is not None:
                for total, g in zip(dkv, grads, strict=True):
                    total[:, block[1]] += g
            del grads
            dkv_hop = ring_pass(dkv, self.group)
            if hop is not None:
                spare = kv if kv is not own else None
                kv, hop = hop.wait(), None
        dk, dv = dkv_hop.wait() if dkv_hop is not None else dkv
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)

    def _block(self, step: int, n: int) -> tuple[slice, slice] | None:
        """Return (query rows, key rows) that meet at a step, or None when causality leaves nothing."""
        everything, half = slice(None), n // 2
        if step == 0:
            return everything, everything
        if step <= self.group.rank:  # K/V of an earlier rank
            return (everything, slice(0, half)) if self.zigzag else (everything, everything)
        return (slice(half, None), everything) if self.zigzag else None


def _merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge attention over other keys into `out` and `lse`, in place.

    With l = log(exp(l1) + exp(l2)):  out <- out exp(l1 - l) + part exp(l2 - l),  lse <- l.
    """
    b, s, h, e = part.shape
    for tile in tiles(s, _TILE_ELEMENTS // (b * h * e)):
        old, new = lse[:, :, tile], part_lse[:, :, tile]
        total = torch.logaddexp(old, new)
        out[:, tile] *= (old - total).exp().transpose(1, 2).unsqueeze(-1)
        out[:, tile] += part[:, tile] * (new - total).exp().transpose(1, 2).unsqueeze(-1)
        old.copy_(total)
