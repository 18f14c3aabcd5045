"""The world of one rank: real tensors and kernels, and a process group in which all others send what this one has.

Each collective copies this rank's own bytes into the buffers that the others would fill, so shapes, allocations and the
order of calls are those of a real run, and values stay finite: a sum over n ranks is n times this rank's share.  What
is computed from them (the loss, the gradients) means nothing.

Nothing leaves the device, so a step's time is that of its compute and its host copies, with copies on the device in
place of communication; how long that would take is for the time model to say (`estimated`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import Work

from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.method import Layout, Method
from cpbench.runtime.python_group import Options, PythonGroup, Queued
from cpbench.train import World
from cpbench.world.estimate import estimate_case, threads_of_a_rank
from cpbench.world.measure import parallel_groups

BACKEND = "emulated"
"""The process group's name in `torch.distributed`."""
_KEPT = (dist.ReduceOp.AVG, dist.ReduceOp.MAX, dist.ReduceOp.MIN)
"""Reductions of equal values that give the value itself."""


class EmulatedGroup(PythonGroup):
    """One rank's view of a group that has no other ranks.

    Collectives run on the current stream.  Their tensors are held until the wait, as NCCL and gloo hold them.
    """

    backend = BACKEND

    def __init__(self, rank: int, size: int, name: str) -> None:
        super().__init__(rank, size, name)
        self._sent: deque[_Transfer] = deque()
        self._expected: deque[_Transfer] = deque()

    @torch.no_grad()
    def allreduce(self, tensors: Sequence[Tensor], opts: Options = None) -> Work:
        """Reduce each tensor with equal ones of the other ranks, in place."""
        for tensor in tensors:
            self._count("all_reduce", tensor)
            self._reduce_(tensor, opts)
        return Queued(*tensors)

    @torch.no_grad()
    def all_gather_single(self, output: Tensor, input: Tensor, opts: Options = None) -> Work:
        """Put this rank's part into every slot of the output, which may hold it already."""
        self._count("all_gather", input)
        slots = output.view(self._size, -1)
        own = input.reshape(1, -1)
        for others in (slots[: self._rank], slots[self._rank + 1 :]):
            others.copy_(own.expand_as(others))
        if slots[self._rank].data_ptr() != input.data_ptr():
            slots[self._rank].copy_(own[0])
        return Queued(output, input)

    @torch.no_grad()
    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Options = None) -> Work:
        """Reduce this rank's slot of the input with equal ones of the other ranks."""
        self._count("reduce_scatter", input)
        output.view(-1).copy_(input.view(self._size, -1)[self._rank])
        self._reduce_(output, opts)
        return Queued(output, input)

    @torch.no_grad()
    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int] = (),
        input_splits: Sequence[int] = (),
        opts: Options = None,
    ) -> Work:
        """Receive what this rank sends, slot by slot; with unequal splits, as much of it as comes."""
        self._count("all_to_all", input, input_splits)
        _fill(output, input)
        return Queued(output, input)

    def send(self, tensors: Sequence[Tensor], dst: int, tag: int = 0) -> Work:
        """Send tensors, which come back in the order of the calls."""
        for tensor in tensors:
            self._count("send", tensor)
        return self._transfer(tensors, self._sent)

    def recv(self, tensors: Sequence[Tensor], src: int, tag: int = 0) -> Work:
        """Receive what was, or will be, sent; zeros if nothing was when the wait comes."""
        return self._transfer(tensors, self._expected)

    def broadcast(self, tensors: Sequence[Tensor], opts: Options = None) -> Work:
        """Leave the tensors as they are, as if the root had the same."""
        for tensor in tensors:
            if opts.rootRank == self._rank:  # the others only receive
                self._count("broadcast", tensor)
        return Queued(*tensors)

    def barrier(self, opts: Options = None) -> Work:
        """Wait for no one."""
        return Queued()

    def _reduce_(self, tensor: Tensor, opts: Options) -> None:
        operation = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        if operation == dist.ReduceOp.SUM:
            tensor.mul_(self._size)
        elif not any(operation == kept for kept in _KEPT):
            raise NotImplementedError(f"an emulated reduction is SUM, AVG, MAX or MIN, not {operation}")

    def _transfer(self, tensors: Sequence[Tensor], queue: deque[_Transfer]) -> Work:
        made = [_Transfer(tensor) for tensor in tensors]
        queue.extend(made)
        while self._sent and self._expected:
            source, target = self._sent.popleft(), self._expected.popleft()
            with torch.no_grad():
                _fill(target.tensor, source.tensor)
            source.done = target.done = True
        return _Passing(self, made)

    def end(self, transfers: Sequence[_Transfer]) -> None:
        """Give up on transfers whose other end never came."""
        for transfer in transfers:
            if transfer.done:
                continue
            if transfer in self._expected:
                self._expected.remove(transfer)
                transfer.tensor.zero_()
            else:
                self._sent.remove(transfer)
            transfer.done = True


class _Transfer:
    """One end of a message."""

    __slots__ = ("done", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.done = False


class _Passing(Queued):
    """Messages under way: their copy is queued when both ends are there."""

    def __init__(self, group: EmulatedGroup, transfers: Sequence[_Transfer]) -> None:
        super().__init__(*(transfer.tensor for transfer in transfers))
        self._group = group
        self._transfers = transfers

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Give up on what has no other end."""
        self._group.end(self._transfers)
        self._transfers = ()
        return super().wait(timeout)


def _fill(target: Tensor, source: Tensor) -> None:
    """Copy the elements of `source` in order, again from the first where there are too few."""
    target, source = target.view(-1), source.reshape(-1)
    for start in range(0, target.numel(), max(source.numel(), 1)):
        part = target[start : start + source.numel()]
        part.copy_(source[: part.numel()])


def _create(options: Any, _: Any) -> EmulatedGroup:  # noqa: ANN401 - torch's options of a new group
    return EmulatedGroup(options.group_rank, options.group_size, options.group_id)


dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])


@contextmanager
def emulated_world(case: Case, layout: Layout, rank: int) -> Iterator[World]:
    """Be one rank of a case, alone in this process.

    Args:
        case: gives the ranks and the device.
        layout: gives the two degrees.
        rank: the rank to be.
    """
    device = torch.device("cpu")
    if case.device == "cuda":
        # Before the mesh is made: it would else ask whether the ranks fill this machine's devices.
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    dist.init_process_group(
        BACKEND,
        store=dist.HashStore(),  # type: ignore[attr-defined]  # missing in torch's stubs
        rank=rank,
        world_size=case.world_size,
    )
    try:
        with threads_of_a_rank(case):
            mesh = init_device_mesh(case.device, (case.world_size,))
            ulysses, ring = parallel_groups(rank, layout)
            yield World(rank=rank, mesh=mesh, ulysses=ulysses, ring=ring, device=device)
    finally:
        dist.destroy_process_group()


class Estimated(NamedTuple):
    """What the estimate of an emulated case says; None where it cannot."""

    communication_seconds: float | None
    """Time in which compute waits for communication."""
    peak_bytes: int | None
    note: str
    """Where the communication comes from, or why there is none."""


def estimated(case: Case, method: Method, rank: int) -> Estimated:
    """Estimate a case that was emulated: its communication, and its peak to be held against the measured one.

    Args:
        case: resolved; its hardware profile gives the rates.
        method: of the case.
        rank: the rank that ran.
    """
    missing = "so step_seconds and all rates are missing"
    try:
        (estimate,) = estimate_case(case.model_copy(update={"mode": "estimate"}), method, rank=rank).ranks
    except Unsupported as error:
        return Estimated(None, None, f"communication is not modelled ({error}), {missing}")
    peak = estimate.memory.peak_allocated_bytes
    if case.hardware is None:
        return Estimated(None, peak, f"communication between CPU processes is not modelled, {missing}")
    if estimate.modelled is None:
        why = f"profile {case.hardware} has no rates for {estimate.attention_backend}"
        return Estimated(None, peak, f"communication is not modelled ({why}), {missing}")
    return Estimated(
        estimate.modelled.exposed_communication_seconds,
        peak,
        f"communication_seconds is what the time model for {case.hardware} leaves uncovered by compute "
        f"(uncertainty {estimate.modelled.uncertainty:.0%}); compute_seconds is measured",
    )
