"""Follows storages of fake tensors: what a real allocator would have done, with nothing allocated.

Every operator's outputs are looked at; a storage not seen before is an allocation of its size, its end is a free, and
FSDP's resizing of storages in place is both.  What an operator allocates *inside* is invisible here, except for the
attention kernels, whose scratch is stated by `cpbench.runtime.kernels.scratch_bytes`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpbench.memory.timeline import Allocation, Event, Timeline
from cpbench.runtime.kernels import scratch_bytes
from cpbench.runtime.recorder import Recorder

_FSDP = "torch/distributed/fsdp/"
_OURS = ("/cpbench/", "/methods/")
_KERNELS = (torch.ops.cpbench.attention_forward.default, torch.ops.cpbench.attention_backward.default)
_REDUCE = ("post_backward", "foreach_reduce", "reduce_scatter")


class FakeTrace(TorchDispatchMode):
    """While entered, and with the recorder active, keeps a timeline of storages."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.timeline = Timeline()
        self._recorder = recorder
        self._live: dict[int, tuple[Allocation, weakref.ref[Any]]] = {}
        self._stack = ExitStack()
        recorder.active, recorder.device_type, recorder.label = True, "fake", self._label

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
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401 - the context manager protocol
        """Stop."""
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's own signature
        types: Any,  # noqa: ANN401 - torch's own signature
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's own signature
        """Run an operator and note what it allocated."""
        scratch = scratch_bytes(func, args) if func in _KERNELS else 0
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # A DTensor's own storage stands for the whole tensor, and meta tensors are no memory on any device; the
            # shard inside a DTensor comes by as an operator of its own.
            if isinstance(leaf, FakeTensor) and leaf.device.type != "meta":
                self._see(leaf.untyped_storage())
        if scratch:
            self._scratch(scratch)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = storage.size()
        if key in self._live or size == 0:
            return
        allocation = Allocation(bytes=size, scope=tuple(self._recorder.path), site=_site(sys._getframe(2)))
        self._live[key] = (allocation, weakref.ref(storage, self._finaliser(key)))
        self.timeline.events.append(Event(allocation, False, allocation.scope))

    def _finaliser(self, key: int) -> Callable[[Any], None]:
        return lambda _: self._free(key)

    def _free(self, key: int) -> None:
        if key in self._live:
            allocation, _ = self._live.pop(key)
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


def _site(frame: FrameType | None) -> str:
    """The line of ours that made an allocation, and whether FSDP did."""
    ours, fsdp = "", ""
    depth = 0
    while frame is not None and depth < 60 and not ours:
        name = frame.f_code.co_filename
        if _FSDP in name and not fsdp.startswith("FSDP::reduce"):
            reduce = any(part in frame.f_code.co_name for part in _REDUCE)
            fsdp = "FSDP::reduce" if reduce else "FSDP::all_gather"
        elif frame.f_code.co_name != "__torch_dispatch__" and any(part in name for part in _OURS):
            ours = f"{name.rsplit('/', 1)[-1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame, depth = frame.f_back, depth + 1
    return " > ".join(part for part in (ours, fsdp) if part)
