"""What a method may touch besides its arguments; built once a case, passed explicitly, no globals."""

from __future__ import annotations

from dataclasses import dataclass

from cpbench.case import Case
from cpbench.method import AttentionWeights
from cpbench.runtime.collectives import Group
from cpbench.runtime.host_pool import HostPool
from cpbench.runtime.kernels import Kernels
from cpbench.runtime.memo import Memo
from cpbench.runtime.projection import HeadNorm
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.rope import Rope


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """One rank's surroundings of an attention block."""

    case: Case
    ulysses: Group
    """The ranks that exchange heads; size 1 when there are none."""
    ring: Group
    """The ranks that pass K/V around; size 1 when there are none."""
    kernels: Kernels
    rope: Rope
    """The rotation of this rank's local tokens."""
    recorder: Recorder
    host: HostPool
    """Where a method may put what must leave the device."""
    parts_tile: int = 2**22
    """Elements of a tile where a full-width activation is made of its parts (`cpbench.runtime.parts`)."""
    memo: Memo | None = None
    """In a checkpointed block, what its first forward may leave for its recomputation; else None."""

    @property
    def scale(self) -> float:
        """Softmax scale, 1 / sqrt(head_dim)."""
        return float(self.case.architecture.head_dim**-0.5)

    def head_norms(self, weights: AttentionWeights) -> tuple[HeadNorm | None, HeadNorm | None]:
        """Return the norms of queries and keys, or None where the model has none."""
        eps = self.case.architecture.norm_eps
        return (
            None if weights.q_norm is None else HeadNorm(weights.q_norm, eps),
            None if weights.k_norm is None else HeadNorm(weights.k_norm, eps),
        )
