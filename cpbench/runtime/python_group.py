"""A process group written in Python, for ranks that NCCL and gloo cannot serve; what such groups have in common.

torch calls a group's methods by other names in 2.11 (`_allgather_base`, ...) than in 2.13 (`all_gather_single`, ...),
and by a third kind (`..._coalesced`) from the functional collectives.  Here all of them lead to one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Work

from cpbench.runtime.collectives import CollectiveLog, sent_bytes

_ProcessGroup: Any = dist.ProcessGroup  # its stubs have overloads that torch's Python code never calls
Options = Any
"""torch's options of a collective; which class depends on the collective."""


class PythonGroup(_ProcessGroup):
    """One rank's view of a group; a subclass gives the collectives that raise NotImplementedError here."""

    log: ClassVar[CollectiveLog | None] = None
    """Told of every collective of every such group; see `counting`.  It is no context variable, because CUDA's backward
    has its own thread."""
    backend: ClassVar[str]
    """The name in `torch.distributed`."""

    def __init__(self, rank: int, size: int, name: str) -> None:
        super().__init__(rank, size)
        self._rank, self._size, self._name = rank, size, name

    @property
    def group_name(self) -> str:
        """The name in torch's registry."""
        return self._name

    def getBackendName(self) -> str:
        """Return the backend's name."""
        return self.backend

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def allreduce(self, tensors: Sequence[Tensor], opts: Options = None) -> Work:
        """Reduce each tensor over the ranks, in place."""
        raise NotImplementedError

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Options = None) -> Work:
        """Reduce several tensors."""
        return self.allreduce(tensors, opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Options = None) -> Work:
        """Put every rank's input into its slot of the output, which may hold this rank's already."""
        raise NotImplementedError

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Options = None) -> Work:
        return self.all_gather_single(output, input, opts)

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Options = None
    ) -> Work:
        """Gather several tensors."""
        for output, input in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, input, opts)
        return Queued(*outputs, *inputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Options = None) -> Work:
        """Reduce the inputs over the ranks and keep this rank's slot."""
        raise NotImplementedError

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Options = None) -> Work:
        return self.reduce_scatter_single(output, input, opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Options = None
    ) -> Work:
        """Reduce and scatter several tensors."""
        for output, input in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, input, opts)
        return Queued(*outputs, *inputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int] = (),
        input_splits: Sequence[int] = (),
        opts: Options = None,
    ) -> Work:
        """Send each rank its slot of the input; splits count rows, equal ones where none are given."""
        raise NotImplementedError

    def alltoall_base(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int] = (),
        input_splits: Sequence[int] = (),
        opts: Options = None,
    ) -> Work:
        """Send each rank its slot of the input."""
        return self.all_to_all_single(output, input, output_splits, input_splits, opts)

    def _count(self, kind: str, tensor: Tensor, splits: Sequence[int] = ()) -> None:
        """Count a collective; `splits` are those of an all-to-all's input, in rows."""
        if PythonGroup.log is None:
            return
        size = tensor.numel() * tensor.element_size()
        rows = sum(splits)
        sent = size * (rows - splits[self._rank]) // rows if rows else sent_bytes(kind, size, self._size)
        PythonGroup.log.add(kind, sent)


class Queued(Work):
    """A collective whose result has been queued; whoever waits on another stream waits for it."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self._tensors = tensors
        on_gpu = bool(tensors) and tensors[0].is_cuda
        self._queued = torch.cuda.current_stream().record_event() if on_gpu else None

    def wait(self, timeout: Any = None) -> bool:  # noqa: ANN401 - a timedelta
        """Make the current stream wait, and let go of the tensors."""
        if self._queued is not None:
            torch.cuda.current_stream().wait_event(self._queued)
        self._tensors = ()
        return True

    def is_completed(self) -> bool:
        """Return whether the result is there."""
        return self._queued is None or self._queued.query()


@contextmanager
def counting(log: CollectiveLog) -> Iterator[None]:
    """Count the collectives of all groups of this kind, in forward and in backward."""
    before, PythonGroup.log = PythonGroup.log, log
    try:
        yield
    finally:
        PythonGroup.log = before
