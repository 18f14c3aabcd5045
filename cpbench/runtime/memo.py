"""What the first forward of a checkpointed block leaves in host memory, so that its recomputation can skip work.

A checkpointed block runs its attention twice: once forward, where nothing is saved, and once in backward.  What a
method puts here in the first it may read in the second: the attention output and log-sum-exp (`save_attention`), or
all that its backward needs (method `offload`).  On the device nothing of it stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cpbench.runtime.host_pool import HostPool, Stored


@dataclass(slots=True, eq=False)
class Memo:
    """One block's notes, from its first forward to its backward."""

    host: HostPool
    save_attention: bool = False
    """The stack asks that the attention output and log-sum-exp be kept."""
    recomputing: bool = False
    """False in the first forward, True in the one inside backward."""
    kept: dict[str, Stored] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.kept

    def put(self, name: str, t: Tensor) -> None:
        """Keep a tensor; the caller may drop it, but not overwrite it."""
        self.kept[name] = self.host.store(t)

    def prefetch(self, name: str) -> None:
        """Start to bring a tensor back, for a later `read` or `take`."""
        self.host.prefetch(self.kept[name])

    def read(self, name: str) -> Tensor:
        """Return a tensor on the device and keep it."""
        return self.host.read(self.kept[name])

    def take(self, name: str) -> Tensor:
        """Return a tensor on the device and forget it."""
        return self.host.fetch(self.kept.pop(name))
