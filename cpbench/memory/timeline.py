"""A neutral form of what an allocator did: allocations and frees in order, each with where the program was.

Sources differ (`cpbench.memory.cpu_trace`, `cpbench.memory.cuda_trace`), the analysis does not
(`cpbench.memory.categories`).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Allocation:
    """One block of memory from its allocation to its free."""

    bytes: int
    scope: tuple[str, ...]
    """Scopes open when it was made, outermost first, for example `("step", "backward", "attention:3")`."""
    site: str
    """The operators or frames around it, innermost last."""
    inside_kernel: bool = False
    """Made and freed within one call of an attention kernel."""
    label: str | None = None
    """What a mark said it is."""
    shape: tuple[int, ...] | None = None
    """Of the tensor it was made for, where the source knows it."""
    dtype: str | None = None
    """The same, for example `bfloat16`."""


@dataclass(slots=True)
class Event:
    """An allocation or its free."""

    allocation: Allocation
    is_free: bool
    scope: tuple[str, ...]
    """Scopes open at the event."""


@dataclass(slots=True)
class Timeline:
    """Everything an allocator did, in order."""

    events: list[Event] = field(default_factory=list)
    unseen_frees: int = 0
    """Bytes whose free was not seen but whose address was given out again: freed on a thread that is not traced."""
    unmatched_frees: int = 0
    """Frees of memory whose allocation was not seen (made before the trace)."""
