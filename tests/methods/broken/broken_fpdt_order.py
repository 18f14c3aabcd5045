"""A planted fault: chunks are taken from contiguous ranks, so that the i-th chunk holds tokens of later ones."""

from __future__ import annotations

from dataclasses import dataclass

from cpbench.case import Case
from cpbench.method import Layout
from methods.fpdt import Fpdt


@dataclass(frozen=True, kw_only=True)
class BrokenFpdtOrder(Fpdt):
    """FPDT in two chunks, without its token order."""

    chunk_tokens: int = 52

    def layout(self, case: Case, rank: int) -> Layout:
        """Every rank holds one block, in pieces of a chunk's size."""
        own, tokens = case.tokens_per_rank, min(self.chunk_tokens, case.seq_len) // case.world_size
        starts = range(rank * own, (rank + 1) * own, tokens)
        segments = tuple((start, start + tokens) for start in starts)
        return Layout(ulysses_degree=case.world_size, ring_degree=1, segments=segments)


METHOD = BrokenFpdtOrder
