"""The ranks of a verification: all of them, or rank 0 alone while the others wait for its next case."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cpbench.method import Layout
from cpbench.runtime.collectives import CollectiveLog, CountCollectives, Group
from cpbench.runtime.python_group import PythonGroup, counting
from cpbench.train import World
from cpbench.world.measure import parallel_groups


@dataclass(frozen=True, slots=True)
class Ranks:
    """What one of `size` ranks needs to run a method and to compare its result on rank 0."""

    rank: int
    size: int
    mesh: DeviceMesh
    device: torch.device
    _groups: dict[tuple[int, int], tuple[Group, Group]] = field(default_factory=dict)
    timeout: timedelta | None = None
    """After so long a rank that waits for another gives up; None: torch's default."""

    @classmethod
    def make(cls, device: torch.device, timeout: timedelta | None = None) -> tuple[Ranks, Ranks]:
        """Return (all ranks, this rank alone); every rank must call it."""
        rank, size = dist.get_rank(), dist.get_world_size()
        everyone = init_device_mesh(device.type, (size,))
        one = init_device_mesh(device.type, (size, 1), mesh_dim_names=("copy", "shard"))["shard"]
        return cls(rank, size, everyone, device, timeout=timeout), cls(0, 1, one, device, timeout=timeout)

    def groups(self, layout: Layout) -> tuple[Group, Group]:
        """Return this rank's Ulysses group and ring; groups are made once for each pair of degrees."""
        degrees = (layout.ulysses_degree, layout.ring_degree)
        if degrees not in self._groups:
            self._groups[degrees] = parallel_groups(self.rank, layout, self.timeout)
        return self._groups[degrees]

    def world(self, layout: Layout) -> World:
        """Return what a training step needs to know of the ranks."""
        ulysses, ring = self.groups(layout)
        return World(rank=self.rank, mesh=self.mesh, ulysses=ulysses, ring=ring, device=self.device)

    def counting(self, log: CollectiveLog) -> AbstractContextManager[object]:
        """Count the collectives of this rank."""
        ours = dist.is_initialized() and isinstance(dist.group.WORLD, PythonGroup)
        return counting(log) if ours else CountCollectives(log)

    def sum(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over the ranks in float32, right on rank 0 only, with one collective."""
        if self.size == 1:
            return {name: t.float() for name, t in tensors.items()}
        flat = torch.cat([t.float().flatten() for t in tensors.values()])
        dist.reduce(flat, 0)
        parts = flat.split([t.numel() for t in tensors.values()])
        return {n: part.view(t.shape) for part, (n, t) in zip(parts, tensors.items(), strict=True)}

    def largest(self, value: float) -> float:
        """Return the largest value of any rank; NaN if any is."""
        if self.size == 1:
            return value
        values: list[float] = [0.0] * self.size
        dist.all_gather_object(values, value)
        return max(values, key=lambda v: (v != v, v))

    def largest_of_each(self, counts: dict[str, int]) -> dict[str, int]:
        """Return, for each key of any rank, the largest count."""
        if self.size == 1:
            return dict(counts)
        all_counts: list[dict[str, int]] = [{} for _ in range(self.size)]
        dist.all_gather_object(all_counts, counts)
        keys = dict.fromkeys(key for found in all_counts for key in found)
        return {key: max(found.get(key, 0) for found in all_counts) for key in keys}
