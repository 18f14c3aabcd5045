"""Every collective a method may call, and the counting of all collectives of a step.

Bytes are what one rank *sends to other ranks* with the standard algorithms: for a group of n ranks and an input of
B bytes on this rank, all-to-all sends B (n-1)/n, all-gather B (n-1), reduce-scatter B (n-1)/n, all-reduce
2 B (n-1)/n, a send B, a broadcast B on the root.  Nothing is sent, and nothing is called, in a group of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]  # no __all__
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cpbench.runtime.recorder import Recorder
from cpbench.runtime.tiles import tile_times


@dataclass(frozen=True, slots=True)
class Group:
    """A process group as seen by this rank; `handle` is None in a group of one."""

    size: int
    rank: int
    """Position of this rank in the group."""
    handle: dist.ProcessGroup | None = None
    global_ranks: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, ranks: Sequence[int], rank: int, handle: dist.ProcessGroup | None) -> Group:
        """Return the group of global `ranks` that holds global `rank`."""
        return cls(size=len(ranks), rank=list(ranks).index(rank), handle=handle, global_ranks=tuple(ranks))


def all_to_all_heads(t: Tensor, group: Group, recorder: Recorder) -> Tensor:
    """Exchange sequence for heads: `[b, s/n, h, e] -> [b, s, h/n, e]` over the group's n ranks.

    Group rank i receives heads `[i h/n, (i+1) h/n)`; the sequence is concatenated in group order.  If the caller keeps
    no reference to `t`, it is freed before the exchange, so at most two tensors of its size exist.
    """
    if group.size == 1:
        return t
    packed = _packed_by_heads(t, group, recorder)
    del t
    pending = HeadsPending(packed, group, recorder, asynchronous=False)
    del packed
    return pending.wait()


def start_all_to_all_heads(t: Tensor, group: Group, recorder: Recorder) -> HeadsPending:
    """Start `all_to_all_heads`; compute may go on until `wait` gives the result."""
    if group.size == 1:
        return HeadsPending(t, group, recorder, asynchronous=False)
    packed = _packed_by_heads(t, group, recorder)
    del t
    return HeadsPending(packed, group, recorder, asynchronous=True)


class HeadsPending:
    """A started `all_to_all_heads`; it holds two tensors of its size until `wait`."""

    def __init__(self, packed: Tensor, group: Group, recorder: Recorder, *, asynchronous: bool) -> None:
        self._group = group
        self._recorder = recorder
        self._packed: Tensor | None = packed
        self._received: Tensor | None = None
        self._work: Any = None
        if group.size == 1:
            return
        self._received = torch.empty_like(packed)  # what comes is what attention works on, not staging
        self._holders = _holders(packed, self._received)
        self._work = dist.all_to_all_single(self._received, packed, group=group.handle, async_op=asynchronous)

    def wait(self) -> Tensor:
        """Block (on CUDA: make the stream wait) until the exchange is complete; return `[b, s, h/n, e]`."""
        packed, self._packed = self._packed, None
        received, self._received = self._received, None
        if packed is None:
            raise AssertionError("wait is called once")
        if received is None:  # a group of one
            return packed
        if self._work is not None:
            self._work.wait()
            self._work = None
        _settle(self._recorder, self._holders, packed, received)
        del packed
        # With b == 1 this is a view: [n, 1, s/n, ...] is already [1, s, ...] in memory.
        n, b, local, heads, e = received.shape
        return received.transpose(0, 1).reshape(b, n * local, heads, e)


def _packed_by_heads(t: Tensor, group: Group, recorder: Recorder) -> Tensor:
    """`[b, s/n, h, e] -> [n, b, s/n, h/n, e]`, contiguous."""
    n = group.size
    b, local, heads, e = t.shape
    with recorder.scope("communication"):
        return t.view(b, local, n, heads // n, e).permute(2, 0, 1, 3, 4).contiguous()


def all_to_all_sequence(t: Tensor, group: Group, recorder: Recorder) -> Tensor:
    """Undo `all_to_all_heads`: `[b, s, h/n, e] -> [b, s/n, h, e]`; `t` is freed as there."""
    n = group.size
    if n == 1:
        return t
    b, s, heads, e = t.shape
    with recorder.scope("communication"):
        # [n, b, s/n, h/n, e]; a view if b == 1
        packed = t.view(b, n, s // n, heads, e).transpose(0, 1).contiguous()
        del t
        received = torch.empty_like(packed)
    holders = _holders(packed, received)
    dist.all_to_all_single(received, packed, group=group.handle)
    _settle(recorder, holders, packed, received)
    del packed
    # With one head a rank this would be a strided view, which every later user would have to copy.
    return received.permute(1, 2, 0, 3, 4).reshape(b, s // n, n * heads, e).contiguous()


def _settle(recorder: Recorder, holders: int, packed: Tensor, received: Tensor) -> None:
    """Return when no one but the caller holds the two buffers of an exchange.

    gloo's worker thread lets go of them a moment after the call returns.  Were it the last to hold one, the memory
    would be freed on a thread that the CPU memory trace cannot see, so a traced step waits for it.
    """
    if recorder.active and received.device.type == "cpu":
        deadline = time.monotonic() + 10
        while _holders(packed, received) > holders and time.monotonic() < deadline:
            time.sleep(1e-5)


def _holders(*tensors: Tensor) -> int:
    return sum(t._use_count() for t in tensors)  # type: ignore[attr-defined]  # missing in torch's stubs


@dataclass(slots=True)
class RingPass:
    """A started exchange with the two ring neighbours; `wait` returns what came from the previous rank."""

    works: list[Any]
    received: tuple[Tensor, ...]
    sent: tuple[Tensor, ...]
    """Kept alive, and not to be changed, until `wait`."""

    def wait(self) -> tuple[Tensor, ...]:
        """Block (on CUDA: make the stream wait) until the neighbour's tensors are here."""
        for work in self.works:
            work.wait()
        self.sent = ()
        return self.received


def ring_pass(tensors: Sequence[Tensor], group: Group, *, into: Sequence[Tensor] | None = None) -> RingPass:
    """Start sending tensors to the next rank of the ring and receiving the same shapes from the previous one.

    Args:
        tensors: contiguous.
        group: the ring, of at least two ranks.
        into: buffers to receive in; allocated when None.
    """
    received = tuple(torch.empty_like(t) for t in tensors) if into is None else tuple(into)
    following = group.global_ranks[(group.rank + 1) % group.size]
    previous = group.global_ranks[(group.rank - 1) % group.size]
    operations = [dist.P2POp(dist.isend, t, following, group=group.handle) for t in tensors]
    operations += [dist.P2POp(dist.irecv, t, previous, group=group.handle) for t in received]
    return RingPass(works=dist.batch_isend_irecv(operations), received=received, sent=tuple(tensors))


def _all_to_all(size: int, n: int) -> int:
    return size * (n - 1) // n


def _all_gather(size: int, n: int) -> int:
    return size * (n - 1)


def _all_reduce(size: int, n: int) -> int:
    return 2 * size * (n - 1) // n


def _send(size: int, n: int) -> int:
    return size


_SENT: dict[str, Callable[[int, int], int]] = {
    "all_to_all": _all_to_all,
    "all_gather": _all_gather,
    "reduce_scatter": _all_to_all,
    "all_reduce": _all_reduce,
    "send": _send,
    "broadcast": _send,
}


def sent_bytes(kind: str, size: int, ranks: int) -> int:
    """Return what a rank sends to others in one collective; see the module.

    Args:
        kind: as in a `CollectiveLog`.
        size: bytes of this rank's input.
        ranks: of the group.
    """
    return _SENT[kind](size, ranks)


# Operators by the names torch gives them: (kind, position of the input, of the group, bytes sent).  FSDP calls the c10d
# ones (2.11 to 2.13 differ in the Python function, not in the operator), DTensor the functional ones.
_KINDS: dict[str, tuple[str, int, int, Callable[[int, int], int]]] = {
    "c10d::alltoall_base_": ("all_to_all", 1, 2, _all_to_all),
    "c10d::_allgather_base_": ("all_gather", 1, 2, _all_gather),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1, 2, _all_to_all),
    "c10d::allreduce_": ("all_reduce", 0, 1, _all_reduce),
    "c10d::send": ("send", 0, 1, _send),
    "_c10d_functional::all_reduce": ("all_reduce", 0, 2, _all_reduce),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0, 2, _all_gather),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0, 3, _all_to_all),
}
# Control traffic, or the other end of something already counted.
_UNCOUNTED = frozenset(
    {
        "c10d::recv_",
        "c10d::barrier",
        "_c10d_functional::wait_tensor",
        "_c10d_functional::_wrap_tensor_autograd",
    }
)


@dataclass(slots=True)
class CollectiveLog:
    """Calls and bytes by kind, and every call in order."""

    bytes: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    sequence: list[tuple[str, int]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Collectives this module does not know how to count; a case with any is invalid."""

    def add(self, kind: str, size: int) -> None:
        """Count one call."""
        self.bytes[kind] = self.bytes.get(kind, 0) + size
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.sequence.append((kind, size))


class CountCollectives(TorchDispatchMode):
    """Counts the collectives of everything inside, FSDP's included, in forward and in backward.

    One in a tile that stands for many, in an estimate, is counted as often.
    """

    def __init__(self, log: CollectiveLog) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's own signature
        types: Any,  # noqa: ANN401 - torch's own signature
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's own signature
        """Count a c10d operator, then run it."""
        # A DTensor takes its operator apart first: the norm of all gradients sends inside one.
        if DTensor in types:
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name
            if name in _KINDS:
                kind, tensor, group, sent = _KINDS[name]
                self._add(kind, sent(_nbytes(args[tensor]), _group_size(args[group])))
            elif name == "_c10d_functional::all_to_all_single":
                self._add("all_to_all", _split_bytes(args[0], args[2], args[3]))
            elif name not in _UNCOUNTED:
                self.log.unknown.append(name)
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, size: int) -> None:
        for _ in range(tile_times()):
            self.log.add(kind, size)


def _nbytes(value: Tensor | Sequence[Tensor]) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(t.numel() * t.element_size() for t in value)


def _split_bytes(t: Tensor, splits: Sequence[int], group: Any) -> int:  # noqa: ANN401 - a name, or a boxed group
    """What an all-to-all of unequal pieces, `splits` rows of `t` for each rank, sends to others."""
    rows = sum(splits)
    return _nbytes(t) * (rows - splits[int(_group(group).rank())]) // rows if rows else 0


def _group_size(group: Any) -> int:  # noqa: ANN401 - the name of a group, or a boxed ProcessGroup
    return int(_group(group).size())


def _group(group: Any) -> dist.ProcessGroup:  # noqa: ANN401 - the name of a group, or a boxed ProcessGroup
    if isinstance(group, str):
        return _resolve_process_group(group)  # type: ignore[arg-type]  # a NewType of str
    return dist.ProcessGroup.unbox(group)
