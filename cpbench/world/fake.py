"""The process group without processes: one rank of W whose collectives move nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from cpbench.case import Case
from cpbench.method import Layout
from cpbench.train import World
from cpbench.world.measure import parallel_groups


@contextmanager
def fake_world(case: Case, layout: Layout, rank: int) -> Iterator[World]:
    """Be one rank of a fake process group of the case's size.

    Args:
        case: gives the ranks.
        layout: gives the two degrees.
        rank: the rank to be.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=case.world_size)
    try:
        mesh = init_device_mesh("cpu", (case.world_size,))
        ulysses, ring = parallel_groups(rank, layout)
        yield World(rank=rank, mesh=mesh, ulysses=ulysses, ring=ring, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()
