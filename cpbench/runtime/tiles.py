"""The one loop over tiles: rows in pieces of a fixed size, the last one shorter.

An estimate need not run every tile: after the second, each does what the one before it did, so memory repeats.
`sampled_tiles` makes every loop yield its first two tiles and its last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SAMPLED: ContextVar[bool] = ContextVar("sampled_tiles", default=False)
_HEAD = 2  # the first tile may create what later ones add to, so the second is the one that repeats


def tiles(rows: int, size: int | None) -> Iterator[slice]:
    """Yield slices that cover `rows`; None means a single tile."""
    step = max(rows, 1) if size is None else max(size, 1)
    starts = range(0, rows, step)
    if _SAMPLED.get() and len(starts) > _HEAD + 1:
        chosen: list[int] = [*starts[:_HEAD], starts[-1]]
    else:
        chosen = list(starts)
    for start in chosen:
        yield slice(start, min(start + step, rows))


@contextmanager
def sampled_tiles() -> Iterator[None]:
    """Inside, tile loops run their first two tiles and their last; results are wrong, allocations are not."""
    token = _SAMPLED.set(True)
    try:
        yield
    finally:
        _SAMPLED.reset(token)
