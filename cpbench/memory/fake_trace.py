"""Follows storages of fake tensors: what a real allocator would have done, with nothing allocated.

Every operator's outputs are looked at; a storage not seen before is an allocation of its size, its end is a free, and
FSDP's resizing of storages in place is both.  What an operator allocates *inside* is invisible here, except for the
attention kernels and others that `cpbench.runtime.kernels.scratch_bytes` knows.  Torch's own operators are taken to
allocate nothing of weight; any other that has not declared its scratch is named in `unknown`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import FrameType
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor._op_schema import OpSchema
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode

from cpbench.memory.frames import site
from cpbench.memory.timeline import Allocation, Event, Timeline
from cpbench.runtime.kernels import scratch_bytes
from cpbench.runtime.recorder import Recorder

_TORCH = frozenset(
    {
        "aten",
        "prim",
        "prims",
        "profiler",
        "c10d",
        "_c10d_functional",
        "_c10d_functional_autograd",
        "fsdp",
        "_dtensor",
    }
)
"""Namespaces of operators that come with torch."""
_BETWEEN = ("__torch_dispatch__",)  # of modes around this one


class Observer(Protocol):
    """Whoever wants to know what ran, beside what was allocated."""

    def ran(
        self,
        func: Any,  # noqa: ANN401 - torch's own signature
        args: Sequence[Any],
        kwargs: dict[str, Any],
        result: Any,  # noqa: ANN401 - whatever an operator returns
    ) -> None:
        """Take note of an operator that has just run."""

    def freed(self, allocation: Allocation) -> None:
        """Take note that memory is about to be freed."""


class FakeTrace(TorchDispatchMode):
    """While entered, and with the recorder active, keeps a timeline of storages."""

    def __init__(self, recorder: Recorder, observer: Observer | None = None) -> None:
        super().__init__()
        self.timeline = Timeline()
        self._recorder = recorder
        self.observer = observer
        self._live: dict[int, tuple[Allocation, weakref.ref[Any]]] = {}
        self._stack = ExitStack()
        self._paused = False
        self.unknown: list[str] = []
        """Operators whose inner memory nobody has stated."""
        self.origins: dict[int, Allocation] = {}
        """For each allocation (by `id`) that an operator over a list made: that of its counterpart in the list."""
        recorder.active, recorder.device_type, recorder.label = True, "fake", self._label

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; torch's guard against that costs as much as an operator's own bookkeeping."""
        return False

    def __enter__(self) -> FakeTrace:
        """Begin to follow storages."""
        resize = torch.UntypedStorage.resize_
        trace = self

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            before = storage.size()
            result: torch.UntypedStorage = resize(storage, size)
            if size != before:
                trace._free(storage._cdata)
                trace._see(storage)
            return result

        self._stack.enter_context(patch.object(torch.UntypedStorage, "resize_", resize_))
        # DTensor finds out the shape of a result by running the operator on fake tensors of full size.
        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def unseen(propagator: ShardingPropagator, schema: OpSchema) -> object:
            before, trace._paused = trace._paused, True
            try:
                return propagate(propagator, schema)
            finally:
                trace._paused = before

        self._stack.enter_context(
            patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen)
        )
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401 - the context manager protocol
        """Stop."""
        super().__exit__(*error)
        self._stack.close()

    def allocation_of(self, tensor: Tensor) -> Allocation | None:
        """Return the allocation that holds a tensor now; None if it was not seen."""
        known = self._live.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[0]

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's own signature
        types: Any,  # noqa: ANN401 - torch's own signature
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's own signature
        """Run an operator and note what it allocated."""
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        scratch = 0
        if func.namespace not in _TORCH:
            known = scratch_bytes(func, args)
            if known is None:
                self.unknown.append(func._schema.name)
            scratch = known or 0
        result = func(*args, **kwargs)
        self._look(result)
        if isinstance(result, tuple | list) and args and isinstance(args[0], tuple | list):
            self._pair(result, args[0])
        if scratch:
            self._scratch(scratch)
        if self.observer is not None:
            self.observer.ran(func, args, kwargs, result)
        return result

    def _look(self, result: Any) -> None:  # noqa: ANN401 - whatever an operator returns
        # A DTensor's own storage stands for the whole tensor, and meta tensors are no memory on any device; the
        # shard inside a DTensor comes by as an operator of its own.
        if isinstance(result, FakeTensor):
            if result.fake_device.type != "meta":
                self._see(result.untyped_storage(), result)
        elif isinstance(result, tuple | list):
            for part in result:
                self._look(part)

    def _pair(self, results: Sequence[Any], given: Sequence[Any]) -> None:
        if len(results) == len(given) and all(isinstance(t, FakeTensor) for t in (*results, *given)):
            for made, source in zip(
                map(self.allocation_of, results), map(self.allocation_of, given), strict=True
            ):
                if made is not None and source is not None and made is not source:
                    self.origins[id(made)] = source

    def _see(self, storage: torch.UntypedStorage, tensor: Tensor | None = None) -> None:
        key = storage._cdata
        if key in self._live:
            return
        size = storage.size()
        if size == 0:
            return
        allocation = Allocation(
            bytes=size, scope=tuple(self._recorder.path), site=site(_frames(sys._getframe(1)))
        )
        if tensor is not None:
            allocation.shape, allocation.dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        self._live[key] = (allocation, weakref.ref(storage, self._finaliser(key)))
        self.timeline.events.append(Event(allocation, False, allocation.scope))

    def _finaliser(self, key: int) -> Callable[[Any], None]:
        return lambda _: self._free(key)

    def _free(self, key: int) -> None:
        if key in self._live:
            allocation, _ = self._live.pop(key)
            if self.observer is not None:
                self.observer.freed(allocation)
            self.timeline.events.append(Event(allocation, True, tuple(self._recorder.path)))

    def _scratch(self, size: int) -> None:
        """Memory that a kernel holds only while it runs, beside its outputs."""
        scope = tuple(self._recorder.path)
        allocation = Allocation(bytes=size, scope=scope, site="attention kernel", inside_kernel=True)
        self.timeline.events += [Event(allocation, False, scope), Event(allocation, True, scope)]

    def _label(self, tensor: Tensor, label: str) -> None:
        known = self._live.get(tensor.untyped_storage()._cdata)
        if known is not None:
            known[0].label = label


def _frames(frame: FrameType | None) -> Iterator[tuple[str, int, str]]:
    """Frames as `cpbench.memory.frames.site` takes them, without this module's own and those of modes around it."""
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if function not in _BETWEEN and file != __file__:
            yield file, frame.f_lineno, function
        frame = frame.f_back
