"""A planted fault: USP with tokens in zigzag order over all ranks instead of over the ring, which leaks the future."""

from __future__ import annotations

from dataclasses import dataclass

from cpbench.case import Case
from cpbench.method import Layout, zigzag_segments
from methods.usp import Usp


@dataclass(frozen=True, kw_only=True)
class BrokenUspCausality(Usp):
    """USP on a 2 x 2 mesh with the wrong token order."""

    ring_degree: int = 2

    def layout(self, case: Case, rank: int) -> Layout:
        """Chunks w and 2W-1-w of 2W."""
        segments = zigzag_segments(case.seq_len, case.world_size, rank)
        return Layout(ulysses_degree=case.world_size // 2, ring_degree=2, segments=segments)


METHOD = BrokenUspCausality
