"""The one loop over tiles: rows in pieces of a fixed size, the last one shorter.

An estimate need not run every tile: where tiles add to a sum, each after the second does what the one before it did;
where they do not, each does what the first did.  `sampled_tiles` makes loops yield only those, and the last tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SAMPLED: ContextVar[bool] = ContextVar("sampled_tiles", default=False)


def tiles(rows: int, size: int | None, *, sums: bool = False) -> Iterator[slice]:
    """Yield slices that cover `rows`.

    Args:
        rows: how many there are.
        size: rows of a tile; None means a single tile.
        sums: the first tile creates what later ones add to, so that the second is the one that repeats.
    """
    step = max(rows, 1) if size is None else max(size, 1)
    starts = range(0, rows, step)
    head = 2 if sums else 1
    sampled = _SAMPLED.get() and len(starts) > head + 1
    for start in (*starts[:head], starts[-1]) if sampled else starts:
        yield slice(start, min(start + step, rows))


@contextmanager
def sampled_tiles() -> Iterator[None]:
    """Inside, tile loops run only the tiles that differ; results are wrong, the peak of allocations is not."""
    token = _SAMPLED.set(True)
    try:
        yield
    finally:
        _SAMPLED.reset(token)
