"""What one operation of a step costs, before any rate is known: FLOPs, bytes, ranks, stream and what it waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cpbench.memory.timeline import Allocation

Work = Literal["matmul", "attention", "memory", "collective", "copy"]
Stream = Literal["compute", "communication", "gather", "reduce", "copy_out", "copy_in"]
"""compute; a method's collectives; FSDP's all-gathers and its reduce-scatters; copies to the host and from it."""


@dataclass(slots=True, eq=False)
class Operation:
    """One operation, or `times` equal ones in a row."""

    name: str
    work: Work
    stream: Stream
    scope: tuple[str, ...]
    """Scopes open when it was started, outermost first."""
    flops: int = 0
    size: int = 0
    """Bytes: read and written on the device; of a collective, sent to others; of a copy, moved."""
    shape: tuple[int, ...] = ()
    """Of attention: sequences, queries, keys, query heads, head width; of a collective: elements of its tensor."""
    ranks: int = 1
    """Of a collective: those that take part."""
    ranks_on_node: int = 1
    """Of a collective: the most of them on one node."""
    times: int = 1
    waits: tuple[Operation, ...] = ()
    """Operations on other streams that must be complete before it starts."""
    on: Allocation | None = None
    """What it works on, where one call works on a list of tensors; of a copy, the host memory."""

    @property
    def phase(self) -> str:
        """forward, backward, optimizer, or other."""
        return next((name for name in self.scope if name in ("forward", "backward", "optimizer")), "other")
