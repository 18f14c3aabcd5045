"""A process group for ranks that share one GPU: collectives of its tensors go through host memory, over gloo.

NCCL refuses two ranks on one device.  With this group several real processes run real kernels on the one GPU that
there is, and exchange real values, which is enough to check that a method is right.  Nothing of it says how fast a
method is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Work

from cpbench.runtime.python_group import Options, PythonGroup, Queued

BACKEND = "shared_gpu"
"""The process group's name in `torch.distributed`."""


class SharedGpuGroup(PythonGroup):
    """One rank's view of a group; a collective is over when its call returns, a message when its wait does.

    Tensors travel as bytes, so every dtype does.
    """

    backend = BACKEND

    def __init__(self, given: Any) -> None:  # noqa: ANN401 - torch's options of a new group
        super().__init__(given.group_rank, given.group_size, given.group_id)
        self._gloo: Any = dist.ProcessGroupGloo(given.store, self._rank, self._size, given.timeout)

    def allreduce(self, tensors: Sequence[Tensor], opts: Options = None) -> Work:
        """Reduce each tensor over the ranks, in place."""
        for tensor in tensors:
            self._count("all_reduce", tensor)
            _put(tensor, _reduced(self._everyones(tensor), opts))
        return Queued(*tensors)

    def reduce(self, tensors: Sequence[Tensor], opts: Options = None) -> Work:
        """Reduce each tensor over the ranks, in place on the root; the others keep theirs."""
        for tensor in tensors:
            whole = _reduced(self._everyones(tensor), opts)
            if opts.rootRank == self._rank:
                _put(tensor, whole)
        return Queued(*tensors)

    def broadcast(self, tensors: Sequence[Tensor], opts: Options = None) -> Work:
        """Overwrite tensors with the root's."""
        for tensor in tensors:
            if opts.rootRank == self._rank:  # the others only receive
                self._count("broadcast", tensor)
            _put(tensor, self._everyones(tensor)[opts.rootRank])
        return Queued(*tensors)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Options = None) -> Work:
        """Put every rank's input into its slot of the output."""
        self._count("all_gather", input)
        _put(output, torch.cat([part.flatten() for part in self._everyones(input)]))
        return Queued(output, input)

    def allgather(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Options = None
    ) -> Work:
        """Put every rank's input into a tensor of its own."""
        for parts, input in zip(outputs, inputs, strict=True):
            for part, found in zip(parts, self._everyones(input), strict=True):
                _put(part, found)
        return Queued(*inputs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Options = None) -> Work:
        """Reduce the inputs over the ranks and keep this rank's slot."""
        self._count("reduce_scatter", input)
        slots = [part.view(self._size, -1)[self._rank] for part in self._everyones(input)]
        _put(output, _reduced(slots, opts))
        return Queued(output, input)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int] = (),
        input_splits: Sequence[int] = (),
        opts: Options = None,
    ) -> Work:
        """Send each rank its slot of the input; splits count rows, equal ones where none are given."""
        self._count("all_to_all", input, input_splits)
        received = torch.empty(output.shape, dtype=output.dtype)
        row = input.element_size() * math.prod(input.shape[1:])
        splits = [[size * row for size in sizes] for sizes in (output_splits, input_splits)]
        self._gloo.alltoall_base(_bytes(received), _bytes(_host(input)), *splits).wait()
        _put(output, received)
        return Queued(output, input)

    def send(self, tensors: Sequence[Tensor], dst: int, tag: int = 0) -> Work:
        """Send tensors to a rank of the group."""
        for tensor in tensors:
            self._count("send", tensor)
        sources = [_bytes(_host(tensor)) for tensor in tensors]
        return _Sent([(source, self._gloo.send([source], dst, tag)) for source in sources])

    def recv(self, tensors: Sequence[Tensor], src: int, tag: int = 0) -> Work:
        """Receive tensors from a rank of the group; they are there when the wait returns."""
        arriving = []
        for tensor in tensors:
            landing = torch.empty(tensor.shape, dtype=tensor.dtype)
            arriving.append((tensor, landing, self._gloo.recv([_bytes(landing)], src, tag)))
        return _Arriving(arriving)

    def barrier(self, opts: Options = None) -> Work:
        """Wait for all ranks."""
        self._everyones(torch.zeros(1))
        return Queued()

    def _everyones(self, mine: Tensor) -> list[Tensor]:
        """This tensor on every rank, in host memory."""
        source = _host(mine)
        found = [torch.empty_like(source) for _ in range(self._size)]
        self._gloo.allgather([[_bytes(part) for part in found]], [_bytes(source)]).wait()
        return found


class _Sent(Work):
    """Messages on their way out."""

    def __init__(self, messages: list[tuple[Tensor, Any]]) -> None:
        super().__init__()
        self._messages = messages

    def wait(self, timeout: Any = None) -> bool:  # noqa: ANN401 - a timedelta
        """Wait until gloo needs the sources no more."""
        for _, work in self._messages:
            work.wait()
        self._messages = []
        return True


class _Arriving(Work):
    """Messages on their way in: what they are for, where they land, gloo's work."""

    def __init__(self, messages: list[tuple[Tensor, Tensor, Any]]) -> None:
        super().__init__()
        self._messages = messages

    def wait(self, timeout: Any = None) -> bool:  # noqa: ANN401 - a timedelta
        """Wait for the messages and copy them to the device."""
        for tensor, landing, work in self._messages:
            work.wait()
            _put(tensor, landing)
        self._messages = []
        return True


def _host(t: Tensor) -> Tensor:
    """A contiguous copy in host memory; it waits for what the current stream has to do first."""
    return t.detach().contiguous().cpu()


def _bytes(t: Tensor) -> Tensor:
    """The memory of a contiguous tensor as bytes."""
    return t.flatten().view(torch.uint8)


@torch.no_grad()
def _put(target: Tensor, source: Tensor) -> None:
    """Overwrite a tensor with the elements of one in host memory."""
    target.copy_(source.reshape(target.shape))


def _reduced(parts: Sequence[Tensor], opts: Options) -> Tensor:
    operation = dist.ReduceOp.SUM if opts is None else opts.reduceOp
    stacked = torch.stack(list(parts))
    if operation == dist.ReduceOp.SUM:
        return stacked.sum(0, dtype=stacked.dtype)
    if operation == dist.ReduceOp.AVG:
        return stacked.sum(0, dtype=stacked.dtype).div_(len(parts))
    if operation == dist.ReduceOp.MAX:
        return stacked.amax(0)
    if operation == dist.ReduceOp.MIN:
        return stacked.amin(0)
    raise NotImplementedError(f"ranks that share a GPU reduce by SUM, AVG, MAX or MIN, not {operation}")


def _create(given: Any, _: Any) -> SharedGpuGroup:  # noqa: ANN401 - torch's options of a new group
    return SharedGpuGroup(given)


dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
