"""Writes down the operations of a step over fake tensors, with the streams that a GPU would run them on.

Compute runs in program order.  A collective starts when the compute before it has ended.  Compute goes on when it is
complete, unless it was started asynchronously: then it goes on until something touches what was received, or the
memory of what was sent is freed.  FSDP's all-gathers run ahead of compute as far as its two buffers allow, that is from
the moment when the one before was unpacked; its reduce-scatters are waited for where their buffers are freed or their
results used.  Copies to and from host memory start after the compute before them, and are waited for in the same way.

What changes no data (views, allocations) costs nothing.  Optimizer steps over lists of tensors are written down tensor
by tensor; what the optimizer does with one number a parameter is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]  # no __all__
from torch.distributed.tensor import DTensor

from cpbench.memory.fake_trace import FakeTrace
from cpbench.memory.frames import FSDP, is_ours
from cpbench.memory.timeline import Allocation
from cpbench.runtime.collectives import CollectiveLog
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.tiles import tile_times
from cpbench.timing.operation import Operation, Stream, Work

_MATMULS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_FREE = frozenset(
    {
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize"),
        *("set", "record_stream", "_local_scalar_dense", "item", "is_same_size", "lift_fresh", "device"),
    }
)
_WRITES_ONLY = frozenset({"copy", "fill", "zero", "zeros", "full", "ones", "arange"})
_READS_ROWS = frozenset({"embedding", "index_select", "gather", "index", "nll_loss_forward"})
"""They read as much of their first argument as they return."""


class OpLog(CollectiveLog):
    """Observes a `FakeTrace`, and counts collectives for a `CountCollectives` around it."""

    def __init__(self, recorder: Recorder, *, ranks_on_node: int) -> None:
        """Make an empty log.

        Args:
            recorder: knows the scopes.
            ranks_on_node: consecutive ranks that share a node.
        """
        super().__init__()
        self.active = False
        self.operations: list[tuple[int, Operation]] = []
        """With the number of events of the trace before each."""
        self.trace: FakeTrace
        self._recorder = recorder
        self._ranks_on_node = ranks_on_node
        self._announced: tuple[str, int] | None = None
        self._written: dict[int, Operation] = {}  # by id of the allocation that another stream is writing
        self._read: dict[
            int, dict[Stream, Operation]
        ] = {}  # the last on each stream of those that are reading one
        self._due: list[Operation] = []  # compute must wait for these next
        self._last: Operation | None = None
        self._sent: Operation | None = None
        self._unpacked: Operation | None = None  # by which the last all-gather's buffer was read
        self._free: dict[Any, bool] = {}

    def add(self, kind: str, size: int) -> None:
        """Count a collective that is about to run."""
        super().add(kind, size)
        self._announced = (kind, size)

    def ran(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:  # noqa: ANN401
        """Write down an operator."""
        if not self.active:
            return
        free = self._free.get(func)
        if free is None:
            free = self._free[func] = _costs_nothing(func)
        if free:
            return
        if func.namespace in ("c10d", "_c10d_functional"):
            self._collective(func, args, kwargs)
            return
        given = [_Argument(t, w) for t, w in _tensors(func, args, kwargs)]
        if not given and not _is_data(result):
            return
        name = func._schema.name.split("::")[-1].rstrip("_").removesuffix(".out")
        if "optimizer" in self._recorder.path and any(
            isinstance(a, list | tuple) and _is_data(a) for a in args
        ):
            self._over_lists(name, func, args, kwargs)
        elif name == "copy" and self._host_copy(given):
            return
        elif "optimizer" not in self._recorder.path:
            self._compute(name, func, args, given, result)

    def freed(self, allocation: Allocation) -> None:
        """Compute, whose memory it is, waits for whoever uses it elsewhere."""
        key = id(allocation)
        writer = self._written.pop(key, None)
        self._due += [] if writer is None else [writer]
        self._due += self._read.pop(key, {}).values()

    def _compute(
        self,
        name: str,
        func: Any,  # noqa: ANN401 - an operator
        args: Sequence[Any],
        given: list[_Argument],
        result: Any,  # noqa: ANN401
    ) -> None:
        work: Work = "memory"
        flops = 0
        shape: tuple[int, ...] = ()
        if name in _MATMULS:
            left, right = (args[index] for index in _MATMULS[name])
            work, flops = "matmul", 2 * left.numel() * right.shape[-1]
        elif func.namespace == "cpbench" and name.startswith("attention"):
            work = "attention"
            flops, shape = _attention(args, backward=name == "attention_backward")
        size = _traffic(name, given, result)
        stream, waits = self._waits([a.tensor for a in given])
        if stream == "compute":
            waits = [*self._due, *waits]
            self._due = []
        operation = self._note(name, work, stream, waits, flops=flops, size=size, shape=shape)
        if stream == "compute":
            self._last = operation
            if any(wait.stream == "gather" for wait in waits):
                self._unpacked = operation

    def _waits(self, tensors: Iterable[Tensor]) -> tuple[Stream, list[Operation]]:
        """The stream of a computation, and what it must wait for because of its arguments."""
        keys = [id(a) for a in map(self._allocation, tensors) if a is not None and id(a) in self._written]
        writers = [self._written[key] for key in keys]
        if any(writer.stream == "reduce" for writer in writers) and _fsdp() == "reduce":
            return "reduce", []  # FSDP's own work on what it has just reduced, on the same stream
        for key in keys:
            self._written.pop(key, None)  # two arguments may share memory
        return "compute", list(dict.fromkeys(writers))

    def _over_lists(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
        """An optimizer's operator over lists, tensor by tensor; single numbers are left out."""
        columns = [
            [_Argument(_local(t), written) for t in value]
            for value, written in _values(func, args, kwargs)
            if isinstance(value, list | tuple) and value and all(isinstance(t, Tensor) for t in value)
        ]
        for row in zip(*(column for column in columns if len(column) == len(columns[0])), strict=True):
            tensors = [a for a in row if a.tensor.numel() > 1]
            if not tensors:
                continue
            _, waits = self._waits([a.tensor for a in tensors])
            waits, self._due = [*self._due, *waits], []
            operation = self._note(name, "memory", "compute", waits, size=_traffic(name, tensors, None))
            operation.on = self._allocation(tensors[0].tensor)
            self._last = operation

    def _host_copy(self, given: list[_Argument]) -> bool:
        """Write down a copy to or from host memory; False when it is neither."""
        target, source = (self._allocation(a.tensor) for a in given[:2])
        to_host = target is not None and target.label == "host"
        from_host = source is not None and source.label == "host"
        if to_host == from_host or target is None or source is None:
            return to_host
        _, waits = self._waits([a.tensor for a in given])
        before = [self._last] if self._last is not None else []
        stream: Stream = "copy_out" if to_host else "copy_in"
        size = given[1].tensor.numel() * given[1].tensor.element_size()
        operation = self._note(stream, "copy", stream, [*before, *waits], size=size)
        operation.on = target if to_host else source
        self._written[id(target)] = operation
        self._read.setdefault(id(source), {})[stream] = operation
        return True

    def _collective(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
        tensors = list(_tensors(func, args, kwargs))
        if self._announced is None:
            if func._schema.name == "c10d::recv_" and self._sent is not None:
                self._mark(tensors, self._sent, received=True)
            return
        (kind, size), self._announced = self._announced, None
        ranks, on_node = self._group(args)
        owner = _fsdp()
        stream: Stream = "communication"
        waits = [self._last] if self._last is not None else []
        if owner == "gather":
            stream, waits = "gather", [] if self._unpacked is None else [self._unpacked]
        elif owner == "reduce":
            stream = "reduce"
        shape = tuple(tensor.numel() for tensor, _ in tensors[:1])
        costs = {"size": size, "shape": shape, "ranks": ranks, "ranks_on_node": on_node}
        operation = self._note(kind, "collective", stream, waits, **costs)
        if kind == "send":
            self._sent = operation
            self._mark(tensors, operation, received=False)
        elif owner is not None or (func.namespace == "c10d" and _named(func, args, kwargs, "async_op")):
            self._mark(tensors, operation, received=None)
        else:
            self._due.append(operation)

    def _mark(
        self, tensors: list[tuple[Tensor, bool]], operation: Operation, *, received: bool | None
    ) -> None:
        """Remember what a collective reads and writes; by the operator's own word when `received` is None."""
        for index, (tensor, _) in enumerate(tensors):
            allocation = self._allocation(tensor)
            if allocation is None:
                continue
            # Operators with a result and an input take them in this order.
            if received if received is not None else index == 0:
                self._written[id(allocation)] = operation
            else:
                self._read.setdefault(id(allocation), {})[operation.stream] = operation

    def _group(self, args: Sequence[Any]) -> tuple[int, int]:
        """(ranks, the most on one node) of a collective's group."""
        for value in reversed(args):  # a functional collective names its reduction before its group
            group: Any = None
            if isinstance(value, torch.ScriptObject):
                try:
                    group = dist.ProcessGroup.unbox(value)
                except (RuntimeError, TypeError):
                    continue
            elif isinstance(value, str):
                group = _resolve_process_group(value)  # type: ignore[arg-type]  # a NewType of str
            if group is not None:
                nodes = [rank // self._ranks_on_node for rank in dist.get_process_group_ranks(group)]
                return len(nodes), max(nodes.count(node) for node in set(nodes))
        raise RuntimeError("a collective without a group")

    def _note(self, name: str, work: Work, stream: Stream, waits: list[Operation], **costs: Any) -> Operation:  # noqa: ANN401
        operation = Operation(
            name, work, stream, tuple(self._recorder.path), times=tile_times(), waits=tuple(waits), **costs
        )
        self.operations.append((len(self.trace.timeline.events), operation))
        return operation

    def _allocation(self, tensor: Tensor) -> Allocation | None:
        return self.trace.allocation_of(_local(tensor))


class _Argument:
    """A tensor that an operator takes; `written` if it is changed in place."""

    __slots__ = ("tensor", "written")

    def __init__(self, tensor: Tensor, written: bool) -> None:
        self.tensor = tensor
        self.written = written


def _costs_nothing(func: Any) -> bool:  # noqa: ANN401 - an operator
    """Views, allocations and questions about tensors."""
    schema = func._schema
    namespace, name = schema.name.split("::")
    if namespace in ("prim", "prims", "profiler"):
        return True
    if name.rstrip("_") in _FREE:
        return True
    aliases = [value.alias_info for value in schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _values(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Any, bool]]:  # noqa: ANN401
    """(value, written in place) of each argument that was given."""
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        if value is not None:
            yield value, argument.alias_info is not None and argument.alias_info.is_write


def _tensors(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:  # noqa: ANN401
    for value, written in _values(func, args, kwargs):
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, Tensor):
                yield part, written


def _is_data(value: Any) -> bool:  # noqa: ANN401 - whatever an operator takes or returns
    return isinstance(value, Tensor) or (
        isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value)
    )


def _named(func: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:  # noqa: ANN401
    """An argument by its name; None if the operator has none of that name."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[index] if index < len(args) else kwargs.get(name, argument.default_value)
    return None


def _local(t: Tensor) -> Tensor:
    return t._local_tensor if isinstance(t, DTensor) else t


def _bytes(t: Tensor) -> int:
    """Bytes of a tensor's elements, those that a stride of zero repeats counted once."""
    t = _local(t)
    elements = prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride != 0)
    return elements * t.element_size()


def _traffic(name: str, given: list[_Argument], result: Any) -> int:  # noqa: ANN401 - whatever an operator returns
    """Bytes read and written."""
    changed = {id(a.tensor) for a in given if a.written}
    parts = result if isinstance(result, list | tuple) else (result,)
    made = sum(_bytes(t) for t in parts if isinstance(t, Tensor) and id(t) not in changed)
    if name in _READS_ROWS:
        return 2 * made + sum(_bytes(a.tensor) for a in given[1:])
    writes = sum(_bytes(a.tensor) for a in given if a.written)
    reads = sum(_bytes(a.tensor) for a in given if not a.written)
    updates = 0 if name in _WRITES_ONLY or name in _MATMULS else writes
    return reads + writes + updates + made


def _attention(args: Sequence[Any], *, backward: bool) -> tuple[int, tuple[int, ...]]:
    """FLOPs and shape of an attention operator; causal attention does half of the square.

    Forward has 2 matrix products, backward 5 (Dao 2023, FlashAttention-2).
    """
    q, k = args[1:3] if backward else args[:2]
    causal = bool(args[6] if backward else args[3])
    b, s, h, e = q.shape
    t = k.shape[1]
    square = 2 * b * h * s * t * e * (5 if backward else 2)
    return square // 2 if causal else square, (b, s, t, h, e)


def _fsdp() -> str | None:
    """`gather` or `reduce` when FSDP is the one that asks, as seen from the innermost frame of ours."""
    frame: FrameType | None = sys._getframe(2)
    found = None
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if FSDP in file:
            found = "gather" if found != "reduce" else found
            if any(part in name for part in ("post_backward", "foreach_reduce", "reduce_scatter")):
                found = "reduce"
        elif name not in ("__torch_dispatch__", "ran") and not name.startswith("_") and is_ours(file):
            return found
        frame = frame.f_back
    return found
