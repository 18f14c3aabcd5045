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


def _counted(tile: slice, times: int, before: int) -> Iterator[slice]:
    _TIMES.set(times)
    try:
        yield tile
    finally:
        _TIMES.set(before)
