"""Host memory: exact sizes, reuse, and what is counted."""

from __future__ import annotations

import torch

from cpbench.runtime.host_pool import HostPool
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.streams import Streams

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
