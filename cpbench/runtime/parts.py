"""A full-width activation in parts, one for each stage, that wait in host memory or on the device.

A method that works on a few heads at a time makes an activation's columns one stage after another.  Adding each
stage's product with its rows of a weight to a result would round the result once a stage; here the parts wait, and
`project` multiplies all of them at once, token tile by token tile, so that the result is rounded once, as if the
activation had existed in full.  On the device then lie one tile of it, and one on its way.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cpbench.runtime.host_pool import HostPool, Loading, Stored
from cpbench.runtime.tiles import tiles

Place = Literal["host", "device"]


class Parts:
    """Column blocks of equal row count, in the order they were put in."""

    def __init__(self, host: HostPool, place: Place, tile_elements: int) -> None:
        """Make an empty row of parts.

        Args:
            host: the pool, for parts that wait there.
            place: where parts wait.
            tile_elements: of the activation that `project` has on the device at a time; 2**22 are 8 MiB in bfloat16.
        """
        self._tile_elements = tile_elements
        self._host = host
        self._place = place
        self._parts: list[Tensor | Stored | None] = []

    @classmethod
    def stored(cls, host: HostPool, parts: list[Stored], tile_elements: int) -> Parts:
        """Return parts that lie in host memory already."""
        made = cls(host, "host", tile_elements)
        made._parts = list(parts)
        return made

    def __len__(self) -> int:
        return len(self._parts)

    def put(self, part: Tensor) -> None:
        """Add a part, `[b, n, ...]` or `[b*n, ...]`; the caller may drop it, but not overwrite it."""
        self._parts.append(self._host.store(part) if self._place == "host" else part)

    def prefetch(self, index: int) -> None:
        """Start to bring a part back."""
        part = self._parts[index]
        if isinstance(part, Stored):
            self._host.prefetch(part)

    def take(self, index: int) -> Tensor:
        """Give up a part."""
        part, self._parts[index] = self._parts[index], None
        if part is None:
            raise AssertionError("a part is taken once")
        return self._host.fetch(part) if isinstance(part, Stored) else part

    def give(self) -> list[Stored]:
        """Give up all parts as they lie in host memory."""
        stored = [part for part in self._parts if isinstance(part, Stored)]
        self._parts.clear()
        return stored

    def drop(self) -> None:
        """Give up all parts that are left."""
        for part in self._parts:
            if isinstance(part, Stored):
                self._host.drop(part)
        self._parts.clear()

    def project(self, weight: Tensor, into: Tensor) -> None:
        """Write the product of all parts, side by side, with a weight.

        Args:
            weight: `[columns of all parts, d]`, rows in the order of the parts.
            into: `[b, n, d]`.
        """
        flat = into.flatten(0, 1)
        total = flat.shape[0]
        size = max(1, self._tile_elements // weight.shape[0])
        ahead: tuple[slice, list[Tensor | Loading]] | None = None
        for rows in tiles(total, size):
            loaded = ahead[1] if ahead is not None and ahead[0] == rows else self._load(rows, total)
            following = slice(rows.stop, min(rows.stop + size, total))
            ahead = (following, self._load(following, total)) if rows.stop < total else None
            tile = torch.cat([self._arrive(part) for part in loaded], dim=1)
            del loaded
            torch.mm(tile, weight, out=flat[rows])
            del tile

    def _load(self, rows: slice, total: int) -> list[Tensor | Loading]:
        found: list[Tensor | Loading] = []
        for part in self._parts:
            if part is None:
                raise AssertionError("parts are projected before any is taken")
            if isinstance(part, Stored):
                found.append(self._host.load_rows(part, rows, total))
            else:
                found.append(part.view(total, -1)[rows])
        return found

    def _arrive(self, part: Tensor | Loading) -> Tensor:
        return part if isinstance(part, Tensor) else self._host.arrive(part)
