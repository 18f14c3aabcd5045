"""The world of real ranks: NCCL on GPUs, gloo on CPU processes, started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from cpbench.case import Case
from cpbench.errors import CpbenchError
from cpbench.method import Layout
from cpbench.runtime.collectives import Group
from cpbench.train import World

_COLLECTIVE_TIMEOUT = timedelta(hours=2)  # a hang is ended by the case's own time-out, with a better message


@contextmanager
def measured_world(case: Case, layout: Layout) -> Iterator[World]:
    """Join the process group named by torchrun's environment, and leave it at the end.

    Args:
        case: gives the device.
        layout: gives the two degrees.

    Raises:
        CpbenchError: torchrun started another number of ranks than the case has.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size != case.world_size:
        raise CpbenchError(f"torchrun started {size} ranks for a case of {case.world_size}")
    if case.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=_COLLECTIVE_TIMEOUT, device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=_COLLECTIVE_TIMEOUT)
    try:
        mesh = init_device_mesh(case.device, (size,))
        ulysses, ring = parallel_groups(rank, layout)
        yield World(rank=rank, mesh=mesh, ulysses=ulysses, ring=ring, device=device)
    finally:
        dist.destroy_process_group()


def parallel_groups(rank: int, layout: Layout, timeout: timedelta | None = None) -> tuple[Group, Group]:
    """Return this rank's Ulysses group (consecutive ranks) and ring (ranks one Ulysses group apart).

    Every rank must call this, because making a process group is itself a collective.

    Args:
        rank: this one.
        layout: gives the two degrees.
        timeout: of their collectives; None takes torch's default for the backend, not that of the default group.
    """
    degree, rings = layout.ulysses_degree, layout.ring_degree
    world = range(degree * rings)
    ulysses = [[r for r in world if r // degree == g] for g in range(rings)]
    ring = [[r for r in world if r % degree == g] for g in range(degree)]
    return _join(rank, ulysses, timeout), _join(rank, ring, timeout)


def _join(rank: int, groups: list[list[int]], timeout: timedelta | None) -> Group:
    if len(groups[0]) == 1:
        return Group(size=1, rank=0, global_ranks=(rank,))
    mine: Group | None = None
    for ranks in groups:
        handle = dist.new_group(ranks, timeout=timeout)
        if rank in ranks:
            if not isinstance(handle, dist.ProcessGroup):
                raise AssertionError("a member of a group gets its handle")
            mine = Group.of(ranks, rank, handle)
    if mine is None:
        raise AssertionError("every rank is in one group")
    return mine
