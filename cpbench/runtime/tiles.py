"""The one loop over tiles: rows in pieces of a fixed size, the last one shorter.

An estimate need not run every tile.  Where tiles are independent, the second runs beside what the first left in local
names, and each after that does what the second did.  Where they add to a sum, the second makes the sum, so each after
the third does what the third did.  `sampled_tiles` makes loops yield only those, and a shorter last one; `tile_times`
says for how many tiles the one at hand stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

_Piece = TypeVar("_Piece")
_SAMPLED: ContextVar[bool] = ContextVar("sampled_tiles", default=False)
_TIMES: ContextVar[int] = ContextVar("tile_times", default=1)


def tiles(rows: int, size: int | None, *, sums: bool = False) -> Iterator[slice]:
    """Yield slices that cover `rows`.

    Args:
        rows: how many there are.
        size: rows of a tile; None means a single tile.
        sums: the tiles add to a sum, so that the third is the one that repeats.
    """
    step = max(rows, 1) if size is None else max(size, 1)
    if not _SAMPLED.get():
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))
        return
    whole = rows // step
    outside = _TIMES.get()
    head = 3 if sums else 2
    for index in range(min(whole, head)):
        repeats = whole - head + 1 if index == head - 1 else 1
        yield from _counted(slice(index * step, (index + 1) * step), outside * repeats, outside)
    if rows % step:
        yield from _counted(slice(whole * step, rows), outside, outside)


def growing_rows(rows: int) -> Iterator[int]:
    """Yield 0 to `rows` - 1, of which each does one piece more than the one before: causal attention by chunks.

    An estimate runs the first three or four and the last, and of those between, an odd number, the middle one.  It
    stands for all of them: what grows by the same amount from row to row adds up exactly.
    """
    head = 3 if rows % 2 else 4
    between = rows - head - 1
    if not _SAMPLED.get() or between < 1:
        yield from range(rows)
        return
    outside = _TIMES.get()
    yield from range(head)
    yield from _counted(head + between // 2, outside * between, outside)
    yield rows - 1


def tile_times() -> int:
    """Return for how many tiles the code that runs now stands; loops inside loops multiply."""
    return _TIMES.get()


@contextmanager
def sampled_tiles() -> Iterator[None]:
    """Inside, tile loops run only the tiles that differ; results are wrong, the peak of allocations is not."""
    token = _SAMPLED.set(True)
    try:
        yield
    finally:
        _SAMPLED.reset(token)


def _counted(tile: _Piece, times: int, before: int) -> Iterator[_Piece]:
    _TIMES.set(times)
    try:
        yield tile
    finally:
        _TIMES.set(before)
