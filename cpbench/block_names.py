"""Names tensors of an attention block by the operators that make them, without asking the method.

A projection is named by its weight (x with wq is q), the kernels' outputs by their position, and what copies, converts
or receives a tensor by that tensor; float32 copies of a reduced dtype say so.  A buffer without a name gets that of
what is first written to it.  Inside a tile loop everything is a tile.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _RecordFunctionFast
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cpbench.block_log import BlockLog, Operation
from cpbench.block_schedule import Kind
from cpbench.runtime.recorder import MARK, Recorder

_MARKED = {
    "weight": "weights",
    "weight_gradient": "weight gradients",
    "host": "host",
    "residual": "dy",
    "attention_output": "y",
    "attention_input_gradient": "dx",
}
"""Names of storages that someone else has marked."""
_LOOPS = {"_merge_", "rotate_", "_norm_backward_"}
"""Functions that are one tile loop."""
_LOOP_METHODS = {("parts.py", "project")}
_GEMMS = frozenset({"mm", "addmm", "addmm_", "bmm", "linear", "matmul"})
_PRODUCTS = {
    frozenset({"x", "wq"}): "q",
    frozenset({"x", "wk"}): "k",
    frozenset({"x", "wv"}): "v",
    frozenset({"out", "wo"}): "y",
    frozenset({"tiles", "wo"}): "y",
    frozenset({"dy", "wo"}): "dout",
    frozenset({"dy", "out"}): "dwo",
    **{frozenset({f"d{which}", f"w{which}"}): "dx" for which in "qkv"},
    **{frozenset({"tiles", f"w{which}"}): "dx" for which in "qkv"},
    **{frozenset({f"d{which}", "x"}): f"dw{which}" for which in "qkv"},
}
_FUNCTIONAL: dict[str, Kind] = {
    "all_gather_into_tensor": "all_gather",
    "all_to_all_single": "all_to_all",
}
"""Functional collectives, which PyTorch's own methods call, by operator."""
_WIDE, _PART, _AND = " float32", " part", ", "
_SMALL = 1024  # elements; below, an operator is bookkeeping


class NameOperators(TorchDispatchMode):
    """While entered, names every storage and logs what ran."""

    def __init__(self, recorder: Recorder, log: BlockLog, *, wide: bool) -> None:
        """Prepare.

        Args:
            recorder: whose marks are obeyed.
            log: told what runs.
            wide: float32 is wider than the tensors' dtype, and worth saying.
        """
        super().__init__()
        self._recorder, self._log, self._wide = recorder, log, wide
        self._names: dict[int, str] = {}
        self._fixed: set[int] = set()
        self._parts: dict[int, dict[int, str]] = {}
        """Names of parts of a storage that were written one by one, by their offset."""
        self._contents: dict[int, tuple[str, dict[int, str]]] = {}
        """What lies in a slab of the host pool: its name, and those of its parts."""
        self._under_way: dict[int, Operation] = {}
        """Functional collectives that were not waited for, by the address of what they fill."""
        self._around = 0
        """The address of the tile loop's frame, while operators run in one."""
        self._calls = 0
        recorder.label = self._obey

    def name(self, t: Tensor, name: str) -> None:
        """Name a tensor's storage."""
        address = t.untyped_storage().data_ptr()
        self._names[address] = name
        with _RecordFunctionFast(f"{MARK}{_group(name)}:{address}"):
            pass

    def name_of(self, t: Tensor) -> str:
        """Return the name of a tensor's storage, or an empty one."""
        address = t.untyped_storage().data_ptr()
        whole = self._names.get(address, "")
        if self._packed_in(t):
            return whole
        return self._parts.get(address, {}).get(int(t.storage_offset())) or whole

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's own signature
        types: Any,  # noqa: ANN401 - torch's own signature
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's own signature
        """Run an operator and name what it made."""
        kwargs = kwargs or {}
        inputs = list(_tensors((*args, *kwargs.values())))
        before = {t.untyped_storage().data_ptr() for t in inputs}
        with self._recorder.scope(f"op:{self._log.count}"):
            result = func(*args, **kwargs)
        made = [
            t
            for t in _tensors((result,))
            if t.untyped_storage().data_ptr() not in before and t.untyped_storage().size()
        ]
        for t in made:  # an address that is given out again has no name yet
            address = t.untyped_storage().data_ptr()
            self._names.pop(address, None)
            self._fixed.discard(address)
            self._parts.pop(address, None)
        written = _written(func, args, kwargs)
        self._note(func._schema.name, args, [t for t in inputs if not _among(t, written)], made, written)
        self._log.count += 1
        return result

    def _note(
        self, schema: str, args: Sequence[Any], read: list[Tensor], made: list[Tensor], written: list[Tensor]
    ) -> None:
        operator = schema.split("::")[1]
        loop = self._loop()
        if schema.startswith("cpbench::attention"):
            causal = args[3] if operator == "attention_forward" else args[6]
            names = ("out", "lse") if operator == "attention_forward" else ("dq", "dk", "dv")
            for t, name in zip(made, names, strict=True):
                self.name(t, name if causal else name + _PART)
            self._log.add("compute", "attention", "own keys" if causal else "earlier keys")
        elif operator in _GEMMS:
            product = _PRODUCTS.get(frozenset(self._base(t) for t in read), "")
            for t in made or written:
                self._rename(t, product)
            self._log.add("compute", "projection", product or "?", loop)
        elif schema.startswith("_c10d_functional::"):
            self._functional(operator, args[0], made)
        elif schema.startswith("c10d::"):
            if operator == "alltoall_base_":
                self._rename(args[0], self.name_of(args[1]))
        elif operator == "copy_" and self._log.stream is not None:
            self._copy(args[0], args[1], loop)
        else:
            self._other(operator, read, made, written, loop)

    def _functional(self, operator: str, source: Tensor, made: list[Tensor]) -> None:
        """A functional collective, or the wait for one."""
        if operator in _FUNCTIONAL:
            (received,) = made
            self._rename(received, self.name_of(source))
            parts = self._packed_in(source)
            ranks = range(received.numel() // source.numel())  # more than one in a gather
            self._parts_of(
                received, {rank * source.numel() + at: name for rank in ranks for at, name in parts.items()}
            )
            sent = self.name_of(source).removesuffix(_WIDE)
            operation = self._log.add("communication", _FUNCTIONAL[operator], sent)
            self._under_way[received.untyped_storage().data_ptr()] = operation
        elif operator == "wait_tensor":
            started = self._under_way.pop(source.untyped_storage().data_ptr(), None)
            if started is not None:
                started.done = self._log.count + 1

    def _copy(self, target: Tensor, source: Tensor, loop: int) -> None:
        """A copy on a side stream."""
        if self._log.stream is None:
            raise AssertionError("a copy of the host pool names its stream")
        if self._log.stream == "copy_out":
            moved, address = self.name_of(source), source.untyped_storage().data_ptr()
            parts = dict(self._parts.get(address, {}))
            self._contents[target.untyped_storage().data_ptr()] = moved, parts
        else:
            moved, parts = self._contents.get(source.untyped_storage().data_ptr(), ("", {}))
            self._rename(target, "tiles" if loop else moved)
            self._parts_of(target, parts)
        self._log.add(self._log.stream, "copy", moved, loop)

    def _other(
        self, operator: str, read: list[Tensor], made: list[Tensor], written: list[Tensor], loop: int
    ) -> None:
        source = next((name for t in read if (name := self.name_of(t))), "")
        for t in made:
            # Another shape or other values than its model's: what is first written to it says what it is.
            empty = operator.startswith("new_") or operator == "zeros_like"
            self._rename(t, "" if empty else "tiles" if loop else self._computed(operator, t, read) or source)
            if len(read) == 1 and read[0].numel() == t.numel() and not loop:  # a copy, or a conversion
                self._parts_of(t, self._packed_in(read[0]))
        if operator == "cat" and not loop:
            self._packed(made[0], read)
        for t in written:
            address = t.untyped_storage().data_ptr()
            whole = t.nbytes == t.untyped_storage().nbytes()
            if operator == "copy_" and not whole and not loop and address not in self._fixed:
                self._parts.setdefault(address, {})[int(t.storage_offset())] = source
            if not self._names.get(address):
                self._rename(t, source)
                if operator == "add_" and not loop:  # a sum begins, and this is the first of its parts
                    for part in read:
                        self._rename(part, self._base(part) + _PART)
        if operator in ("empty", "empty_like", "new_empty", "detach"):
            return
        if any(t.numel() >= _SMALL for t in (*made, *written)):
            name = next((n for t in (*written, *made) if (n := self._base(t))), "")
            self._log.add("compute", "elementwise", name, loop)

    def _computed(self, operator: str, result: Tensor, read: list[Tensor]) -> str:
        """The name of what was computed from tensors of one width, some of them perhaps broadcast to it."""
        names = [name for t in read if t.numel() == result.numel() and (name := self.name_of(t))]
        if operator == "sub" and len(names) == 2:
            first, second = (name.removesuffix(_WIDE) for name in names)
            if first.removesuffix(_PART) == second.removesuffix(_PART) and first != second:
                return "merge"  # how far the part of one block is from what was merged before
        return names[0] if names else ""

    def _packed(self, whole: Tensor, parts: list[Tensor]) -> None:
        """Tensors of several names, one after the other in one."""
        names = [self.name_of(t).removesuffix(_WIDE) for t in parts]
        if len({self._base(t) for t in parts}) > 1 and whole.dim() == 1:
            self._rename(whole, _AND.join(names))
            offsets = accumulate((t.numel() for t in parts[:-1]), initial=0)
            self._parts_of(whole, dict(zip(offsets, names, strict=True)))

    def _packed_in(self, t: Tensor) -> dict[int, str]:
        """The parts of a tensor in which several were packed, if it is all of its storage."""
        address = t.untyped_storage().data_ptr()
        packed = _AND in self._names.get(address, "") and t.nbytes == t.untyped_storage().nbytes()
        return self._parts.get(address, {}) if packed else {}

    def _parts_of(self, t: Tensor, parts: dict[int, str]) -> None:
        """Name the parts of a storage."""
        if parts:
            self._parts[t.untyped_storage().data_ptr()] = dict(parts)

    def _rename(self, t: Tensor, name: str) -> None:
        if t.untyped_storage().data_ptr() in self._fixed:
            return
        base = name.removesuffix(_WIDE)
        wide = self._wide and t.dtype is torch.float32 and base and base[0] not in "lwt"
        self.name(t, base + _WIDE if wide else base)

    def _obey(self, t: Tensor, label: str) -> None:
        if label in _MARKED:
            self.name(t, _MARKED[label])
            self._fixed.add(t.untyped_storage().data_ptr())

    def _base(self, t: Tensor) -> str:
        return self.name_of(t).removesuffix(_WIDE).removesuffix(_PART)

    def _loop(self) -> int:
        """The call of a tile loop around the operator that runs now, or 0."""
        frame: FrameType | None = sys._getframe(3)
        depth = 0
        while frame is not None and depth < 12:
            code = frame.f_code
            if code.co_name in _LOOPS or (code.co_filename.rsplit("/", 1)[-1], code.co_name) in _LOOP_METHODS:
                if self._around != id(frame):
                    self._around, self._calls = id(frame), self._calls + 1
                return self._calls
            frame, depth = frame.f_back, depth + 1
        self._around = 0
        return 0


def _group(name: str) -> str:
    """The name under which a storage's bytes are counted."""
    if name.startswith("dw"):
        return "weight gradients"
    return "weights" if name.startswith("w") else name or "tiles"


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, AsyncCollectiveTensor):
            yield value.elem
        elif isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:  # noqa: ANN401 - an OpOverload
    """Arguments that an operator writes to."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += list(_tensors((value,)))
    return found


def _among(t: Tensor, others: Sequence[Tensor]) -> bool:
    return any(t is other for other in others)
