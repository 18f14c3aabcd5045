"""Says where in a step the program is, for whoever traces memory; costs nothing when no one does.

A *scope* is a nested region such as forward / attention; a *mark* names the storage of a tensor after the fact
("this allocation is the block's output").  On CPU both become profiler annotations, which nest exactly with the
allocator's events; on CUDA the scope path travels with every allocation as the allocator's own metadata, which is one
for each thread, so the times of all changes are kept too; an estimate reads both from here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._C._profiler import _RecordFunctionFast

PREFIX = "cpbench-scope:"
MARK = "cpbench-mark:"


@dataclass(frozen=True, slots=True)
class Mark:
    """The storage at `address` is, from its allocation on, what `label` says."""

    time_ns: int
    address: int
    label: str


@dataclass(frozen=True, slots=True)
class Moment:
    """From this time on, these scopes are open."""

    time_ns: int
    path: str
    """Outermost first, separated by slashes."""


@dataclass(slots=True)
class Recorder:
    """Scopes and marks of one rank; inactive until a memory trace switches it on."""

    active: bool = False
    device_type: str = "cpu"
    """`cpu`, `cuda`, or `fake` for an estimate."""
    marks: list[Mark] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    """Every change of scope, on CUDA."""
    label: Callable[[Tensor, str], None] | None = None
    """Takes marks where there are no addresses: fake tensors."""
    path: list[str] = field(default_factory=list)
    """Scopes open now, outermost first."""

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Name what happens inside, for example `attention:3`."""
        if not self.active:
            yield
            return
        self.path.append(name)
        try:
            if self.device_type == "cuda":
                self._tell_allocator()
                yield
            elif self.device_type == "fake":
                yield
            else:
                # Not torch.profiler.record_function: that is an operator, and under a dispatch mode the profiler would
                # close the scope with the mode's own frame.
                with _RecordFunctionFast(PREFIX + name):
                    yield
        finally:
            self.path.pop()
            if self.device_type == "cuda":
                self._tell_allocator()

    def _tell_allocator(self) -> None:
        path = "/".join(self.path)
        torch.cuda.memory._set_memory_metadata(path)
        self.moments.append(Moment(time.time_ns(), path))

    def mark(self, label: str, *tensors: Tensor | None) -> None:
        """Name the storage of tensors that exist now; None is skipped."""
        if not self.active:
            return
        for tensor in tensors:
            if tensor is None:
                continue
            if self.label is not None:
                self.label(tensor, label)
                continue
            address = tensor.untyped_storage().data_ptr()
            if self.device_type == "cuda":
                self.marks.append(Mark(time.time_ns(), address, label))
            else:
                with _RecordFunctionFast(f"{MARK}{label}:{address}"):
                    pass
