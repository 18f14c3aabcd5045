"""Host memory: exact sizes, reuse, and what is counted."""

from __future__ import annotations

import pytest
import torch

from cpbench.runtime.host_pool import HostPool
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.streams import Streams
from cpbench.runtime.tiles import sampled_tiles, tiles

CPU = torch.device("cpu")


def pool() -> HostPool:
    return HostPool(CPU, Streams(CPU), Recorder())


def test_what_is_stored_comes_back() -> None:
    """Values, shape and dtype survive, whatever happens to the source."""
    host, t = pool(), torch.randn(3, 5).bfloat16()
    expected = t.clone()

    stored = host.store(t)
    t.zero_()

    assert torch.equal(expected, host.fetch(stored))


def test_slabs_are_exact_and_reused() -> None:
    """The pool holds exactly the bytes that are stored at once, and a free slab serves the next of its size."""
    host = pool()
    first, second = host.store(torch.zeros(1000)), host.store(torch.ones(1000))
    assert host.peak_bytes == 8000

    host.fetch(first)
    third = host.store(torch.full((1000,), 3.0))

    assert host.peak_bytes == 8000
    assert host.fetch(second)[0] == 1
    assert host.fetch(third)[0] == 3


def test_what_is_overwritten_keeps_its_slab() -> None:
    """A tensor that was read goes back to where it lay, and no memory is taken."""
    host = pool()
    stored = host.store(torch.zeros(1000))

    host.overwrite(stored, host.read(stored) + 2)

    assert host.peak_bytes == 4000
    assert host.fetch(stored)[0] == 2


@pytest.mark.parametrize("free", [0, 1, 3, 6])
def test_a_tile_stores_for_all_that_it_stands_for(free: int) -> None:
    """Slabs and their reuse are those of the whole loop, and the one that is written stands alone."""
    whole, sampled = pool(), pool()

    after = keep_five(whole, free), whole.peak_bytes
    with sampled_tiles():
        kept = keep_five(sampled, free)

    assert after == (kept, sampled.peak_bytes)


def keep_five(host: HostPool, free: int) -> list[int]:
    """Bytes of the pool after each round of storing five tensors one by one, with some slabs free at first."""
    for stored in [host.store(torch.zeros(1000)) for _ in range(free)]:
        host.drop(stored)
    after = []
    for _ in range(2):
        kept = [host.store(torch.full((1000,), float(tile.start))) for tile in tiles(5, 1)]
        after.append(host.bytes)
        assert [host.read(stored)[0] for stored in kept] == list(range(len(kept)))
        for stored in kept:
            host.drop(stored)
    extra = [host.store(torch.zeros(1000)) for _ in range(6)]
    assert len({id(stored.slab) for stored in extra}) == 6
    return [*after, host.bytes]
