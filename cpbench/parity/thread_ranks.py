"""N ranks as threads on one device, which really exchange their tensors: parity of attention where GPUs are few.

All threads queue their work on the device's default stream, so what a rank reads after it has met the others was
written before.  Each thread runs its own backward, because CUDA's one backward thread would wait for itself.  There is
no default process group: what needs one (FSDP, torch's own ring) cannot run this way.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import Work

from cpbench.method import Layout
from cpbench.parity.ranks import Ranks
from cpbench.runtime.collectives import Group

_SECONDS = 240.0
"""A rank that waits longer for another gives up."""
_ProcessGroup: Any = dist.ProcessGroup  # its stubs have overloads that torch's Python code never calls
Result = TypeVar("Result")


class _Meeting:
    """Where the ranks of one group hand one another their tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=_SECONDS)
        self.slots: list[Any] = [None] * size
        # All made here: two threads that ask for a missing one at the same moment would get two.
        self.mail: dict[tuple[int, int], queue.Queue[_Message]] = {
            (source, target): queue.Queue() for source in range(size) for target in range(size)
        }


class _Message:
    """A tensor on its way, and whether it has been read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.read = threading.Event()


class _Sent(Work):
    """A send is over when its tensor may be written again."""

    def __init__(self, messages: Sequence[_Message]) -> None:
        super().__init__()
        self._messages = messages

    def wait(self, timeout: Any = None) -> bool:  # noqa: ANN401 - a timedelta
        """Wait for the receivers."""
        if not all(message.read.wait(_SECONDS) for message in self._messages):
            raise TimeoutError("a rank did not receive what was sent to it")
        return True


class _Over(Work):
    def wait(self, timeout: Any = None) -> bool:  # noqa: ANN401 - a timedelta
        """Return: the exchange was over when it was started."""
        return True


class ThreadGroup(_ProcessGroup):
    """One thread's handle on a group of threads; its methods carry the names of torch 2.11 and of 2.13."""

    def __init__(self, rank: int, ranks: Sequence[int], meeting: _Meeting) -> None:
        super().__init__(list(ranks).index(rank), len(ranks))
        self._rank, self._size = list(ranks).index(rank), len(ranks)
        self._meeting = meeting
        # Point-to-point operations look group ranks up here.
        distributed_c10d._world.pg_group_ranks[self] = {rank: i for i, rank in enumerate(ranks)}

    def size(self) -> int:
        """Return the number of threads."""
        return self._size

    def exchange(self, mine: Result, use: Callable[[list[Result]], None]) -> None:
        """Give everyone what is mine, and use what all gave while it is still there."""
        self._meeting.slots[self._rank] = mine
        self._meeting.barrier.wait()
        use(list(self._meeting.slots))
        self._meeting.barrier.wait()

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int] = (),
        input_splits: Sequence[int] = (),
        opts: Any = None,  # noqa: ANN401 - torch's options
    ) -> Work:
        """Exchange equal parts."""
        if output_splits or input_splits:
            raise NotImplementedError("threads exchange equal parts")

        def use(inputs: list[Tensor]) -> None:
            with torch.no_grad():
                for part, other in zip(output.view(self._size, -1), inputs, strict=True):
                    part.copy_(other.view(self._size, -1)[self._rank])

        self.exchange(input, use)
        return _Over()

    alltoall_base = all_to_all_single

    def send(self, tensors: Sequence[Tensor], dst: int, tag: int = 0) -> Work:
        """Post tensors to a rank of the group."""
        messages = [_Message(tensor) for tensor in tensors]
        for message in messages:
            self._meeting.mail[self._rank, dst].put(message)
        return _Sent(messages)

    def recv(self, tensors: Sequence[Tensor], src: int, tag: int = 0) -> Work:
        """Copy the next tensors that a rank of the group posted to this one."""
        for tensor in tensors:
            message = self._meeting.mail[src, self._rank].get(timeout=_SECONDS)
            with torch.no_grad():
                tensor.copy_(message.tensor)
            message.read.set()
        return _Over()


class Threads:
    """What the threads of one run share."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self._meetings: dict[tuple[int, ...], _Meeting] = {}
        self._lock = threading.Lock()

    def group(self, rank: int, ranks: tuple[int, ...]) -> Group:
        """Return a rank's view of a group that it is in."""
        if len(ranks) == 1:
            return Group(size=1, rank=0, global_ranks=ranks)
        return Group.of(ranks, rank, ThreadGroup(rank, ranks, self._meeting(ranks)))

    def run(self, work: Callable[[ThreadRanks], Result]) -> Result:
        """Run the same work on every rank and return what rank 0 returns.

        Raises:
            Exception: of the first rank that failed.
        """
        results: dict[int, Result] = {}
        failures: list[BaseException] = []

        def body(rank: int) -> None:
            try:
                with torch.autograd.set_multithreading_enabled(False):
                    results[rank] = work(ThreadRanks.of(self, rank))
            except BaseException as error:
                if not isinstance(error, threading.BrokenBarrierError):  # the others break after it
                    failures.append(error)
                with self._lock:
                    for meeting in self._meetings.values():
                        meeting.barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        distributed_c10d._world.pg_group_ranks.clear()
        if failures:
            raise failures[0]
        return results[0]

    def _meeting(self, ranks: tuple[int, ...]) -> _Meeting:
        with self._lock:
            return self._meetings.setdefault(ranks, _Meeting(len(ranks)))


class ThreadRanks(Ranks):
    """`Ranks` whose ranks are threads; there is no mesh."""

    threads: Threads
    everyone: Group

    @classmethod
    def of(cls, threads: Threads, rank: int) -> ThreadRanks:
        """Return the ranks as one of them sees them."""
        ranks = cls(rank=rank, size=threads.size, mesh=cast(DeviceMesh, None), device=threads.device)
        object.__setattr__(ranks, "threads", threads)
        object.__setattr__(ranks, "everyone", threads.group(rank, tuple(range(threads.size))))
        return ranks

    def groups(self, layout: Layout) -> tuple[Group, Group]:
        """Return this rank's Ulysses group and ring, placed as `cpbench.world.measure.parallel_groups` does."""
        degree, world = layout.ulysses_degree, range(self.size)
        ulysses = tuple(r for r in world if r // degree == self.rank // degree)
        ring = tuple(r for r in world if r % degree == self.rank % degree)
        return self.threads.group(self.rank, ulysses), self.threads.group(self.rank, ring)

    def sum(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over the ranks in float32."""
        total: dict[str, Tensor] = {}

        def use(given: list[dict[str, Tensor]]) -> None:
            for name in tensors:
                total[name] = torch.stack([other[name].float() for other in given]).sum(0)

        if self.size == 1:
            return {name: t.float() for name, t in tensors.items()}
        if not isinstance(self.everyone.handle, ThreadGroup):
            raise AssertionError("a group of threads")
        self.everyone.handle.exchange(tensors, use)
        return total
