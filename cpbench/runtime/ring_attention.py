"""Ring attention over a group: K/V travel from rank to rank while every rank attends with its own queries.

Source: Liu et al. 2023 (Ring Attention); the zigzag balance is that of zhuzilin/ring-flash-attention; the merge of
blocks is the log-sum-exp form of Milakov and Gimelshein 2018.

Forward: K/V move to the next rank while the current block is computed; partial outputs merge in float32, in place,
tile by tile.  Backward: K/V travel again; dK/dV travel with them in float32, one hop behind, and are home after R
hops, the last of which carries nothing else; dQ accumulates in float32.  A rank that meets one block only (the first
of a contiguous ring) makes no float32 copy.  In a ring of one nothing is sent, copied or merged.

Which parts of q and k meet (`_block`): with zigzag, the local tokens are [early half | late half]; with K/V of an
earlier ring rank all queries meet its early half, with K/V of a later one only late queries meet all of it.  With
contiguous blocks all queries meet all keys of an earlier rank and nothing of a later one.

Ownership.  An argument to which the caller keeps no reference is freed when its last reader has it: own K/V after the
first hop, queries before the output is rounded.
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
        if self.group.size == 1:
            return self.kernels.forward(q, k, v, causal=True, scale=self.scale)
        dtype, n, last = q.dtype, q.shape[1], self._last_step()
        travel = _KeysValues(self.group, k, v)
        travel.start()
        out, lse = self.kernels.forward(q, k, v, causal=True, scale=self.scale)
        del k, v
        travel.finish()
        if last > 0:
            out = out.float()
        for step in range(1, last + 1):
            travel.start()
            rows, keys = self._block(step, n)
            part, part_lse = self.kernels.forward(
                q[:, rows], travel.k[:, keys], travel.v[:, keys], causal=False, scale=self.scale
            )
            _merge_(out[:, rows], lse[:, :, rows], part, part_lse)
            del part, part_lse
            travel.finish()
        del q
        out = out.to(dtype)
        for _ in range(last + 1, self.group.size):
            travel.start()
            travel.finish()
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) of this rank's tokens, in q's dtype; `out` and `lse` are those of the whole ring."""
        if self.group.size == 1:
            return self.kernels.backward(dout, q, k, v, out, lse, causal=True, scale=self.scale)
        dtype, n, last = q.dtype, q.shape[1], self._last_step()
        travel = _KeysValues(self.group, k, v)
        travel.start()
        dq, dk, dv = self.kernels.backward(dout, q, k, v, out, lse, causal=True, scale=self.scale)
        del k, v
        travel.finish()
        if last > 0:
            dq = dq.float()
        home: RingPass | None = ring_pass((dk.float().contiguous(), dv.float().contiguous()), self.group)
        del dk, dv
        for step in range(1, last + 1):
            travel.start()
            rows, keys = self._block(step, n)
            part, dk, dv = self.kernels.backward(
                dout[:, rows],
                q[:, rows],
                travel.k[:, keys],
                travel.v[:, keys],
                out[:, rows],
                lse[:, :, rows],
                causal=False,
                scale=self.scale,
            )
            dq[:, rows] += part
            del part
            totals, home = _arrived(home), None
            totals[0][:, keys] += dk
            totals[1][:, keys] += dv
            del dk, dv
            home = ring_pass(totals, self.group)
            del totals
            travel.finish()
        del dout, q, out, lse
        dq = dq.to(dtype)
        for _ in range(last + 1, self.group.size):
            travel.start()
            totals, home = _arrived(home), None
            home = ring_pass(totals, self.group)
            del totals
            travel.finish()
        (dk, dv), home = _arrived(home), None
        return dq, dk.to(dtype), dv.to(dtype)

    def _last_step(self) -> int:
        """The last step at which this rank meets any keys; it does at every one before."""
        return self.group.size - 1 if self.zigzag else self.group.rank

    def _block(self, step: int, n: int) -> tuple[slice, slice]:
        """Return (query rows, key rows) that meet at a step after the first, up to the last one that has any."""
        everything, half = slice(None), n // 2
        if not self.zigzag:
            return everything, everything
        if step <= self.group.rank:  # K/V of an earlier rank
            return everything, slice(0, half)
        return slice(half, None), everything


class _KeysValues:
    """K/V on their way round a ring: those at hand, and those that arrive while they are used."""

    def __init__(self, group: Group, k: Tensor, v: Tensor) -> None:
        self.k = k
        self.v = v
        self._group = group
        self._hops = group.size - 1
        self._hop: RingPass | None = None
        self._owned = False
        self._spare: tuple[Tensor, ...] | None = None

    def start(self) -> None:
        """Send what is at hand on, and begin to receive the next, if there is one."""
        if self._hops > 0:
            self._hops -= 1
            self._hop = ring_pass((self.k, self.v), self._group, into=self._spare)
            self._spare = None

    def finish(self) -> None:
        """Put the next at hand; what was there is received into, or freed once nothing more arrives."""
        hop, self._hop = self._hop, None
        if hop is None:
            del self.k, self.v
            return
        # The rank's own K/V may still be someone's; only what was received here may be overwritten.
        self._spare = (self.k, self.v) if self._owned and self._hops > 0 else None
        self.k, self.v = hop.wait()
        self._owned = True


def _arrived(hop: RingPass | None) -> tuple[Tensor, ...]:
    if hop is None:
        raise AssertionError("gradients are always on their way")
    return hop.wait()


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
