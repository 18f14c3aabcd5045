"""Rotary position embedding, in place and in token tiles, from global positions.

Source: Su et al. 2021 (RoFormer), in the half-split pairing of Hugging Face's Llama: with u, w the two halves of a
head, (u, w) -> (u cos - w sin, w cos + u sin), angle = position x theta^(-2i/e).

Angles are computed in float64: at position 5M a float32 angle is off by up to 0.25 rad.  Each tile computes its own
table, so no `[n, e]` table lives beside the activations, and temporaries stay at a fixed size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cpbench.runtime.tiles import tiles

_TILE_ELEMENTS = 2**21  # 8 MiB of float32 for each of the few temporaries of a tile


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotation of one rank's tokens."""

    segments: tuple[tuple[int, int], ...]
    """Global positions [start, stop) in local order."""
    theta: float

    def rotate_(self, t: Tensor, *, inverse: bool = False) -> Tensor:
        """Rotate `[b, n, h, e]` in place and return it; the inverse is also the gradient of the rotation."""
        b, _n, h, e = t.shape
        half = e // 2
        frequency = self.theta ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
        for local, start, stop in self._tiles(_TILE_ELEMENTS // (b * h * e)):
            position = torch.arange(start, stop, dtype=torch.float64, device=t.device)
            angle = torch.outer(position, frequency)
            cos = angle.cos().to(torch.float32).unsqueeze(1)  # [tile, 1, e/2]
            sin = angle.sin().to(torch.float32).unsqueeze(1)
            if inverse:
                sin = -sin
            first, second = t[:, local : local + stop - start].split(half, dim=-1)
            rotated = first * cos - second * sin
            second.copy_(second * cos + first * sin)
            first.copy_(rotated)
        return t

    def _tiles(self, size: int) -> Iterator[tuple[int, int, int]]:
        """Yield (local offset, global start, global stop) of each tile."""
        local = 0
        for start, stop in self.segments:
            for rows in tiles(stop - start, size):
                yield local + rows.start, start + rows.start, start + rows.stop
            local += stop - start
