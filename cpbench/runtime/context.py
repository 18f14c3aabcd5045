"""What a method may touch besides its arguments; built once a case, passed explicitly, no globals."""

from __future__ import annotations

from dataclasses import dataclass

from cpbench.case import Case
from cpbench.method import AttentionWeights
from cpbench.runtime.collectives import Group
from cpbench.runtime.host_pool import HostPool
from cpbench.runtime.kernels import Kernels
from cpbench.runtime.memo import Memo
from cpbench.runtime.projection import HeadNorm, Projection, Which
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

    def projections(self, weights: AttentionWeights) -> dict[Which, Projection]:
        """Return what makes `q`, `k` and `v` of the hidden states of all of this rank's tokens."""
        w, eps = weights, self.case.architecture.norm_eps
        q_norm = None if w.q_norm is None else HeadNorm(w.q_norm, eps)
        k_norm = None if w.k_norm is None else HeadNorm(w.k_norm, eps)
        return {
            "q": Projection(w.wq, w.bq, q_norm, self.rope),
            "k": Projection(w.wk, w.bk, k_norm, self.rope),
            "v": Projection(w.wv, w.bv),
        }
