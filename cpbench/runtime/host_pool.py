"""Host memory for what leaves the device: exact-size slabs, page-locked for CUDA, reused, and counted.

A slab is registered with the driver once and handed out again to tensors of the same size, because registering is
slow and because torch's own pinned allocator rounds up to powers of two.  `peak_bytes` is the third memory budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpbench.runtime.recorder import Recorder
from cpbench.runtime.streams import Streams


@dataclass(slots=True, eq=False)
class Stored:
    """A tensor in host memory."""

    slab: Tensor  # [nbytes] uint8
    shape: torch.Size
    dtype: torch.dtype
    copied: torch.cuda.Event | None
    """When the copy out is complete."""
    source: Tensor | None
    """Kept until then."""
    arrived: torch.cuda.Event | None = None
    fetched: Tensor | None = None

    def view(self) -> Tensor:
        """The stored tensor, in host memory."""
        return self.slab.view(self.dtype).view(self.shape)


class HostPool:
    """Stores tensors in host memory on the copy-out stream and brings them back on the copy-in stream."""

    def __init__(self, device: torch.device, streams: Streams, recorder: Recorder) -> None:
        self._device = device
        self._streams = streams
        self._recorder = recorder
        self._free: dict[int, list[Tensor]] = {}
        self._leaving: list[Stored] = []
        self.bytes = 0
        """Bytes of all slabs."""

    @property
    def peak_bytes(self) -> int:
        """Most bytes ever held; slabs are kept for reuse, so it equals what is held."""
        return self.bytes

    def store(self, t: Tensor) -> Stored:
        """Start copying a contiguous tensor out; it may be dropped by the caller at once."""
        self._release_copied()
        slab = self._take(t.numel() * t.element_size())
        stored = Stored(slab=slab, shape=t.shape, dtype=t.dtype, copied=None, source=t)
        with self._streams.after_compute("copy_out"):
            stored.view().copy_(t, non_blocking=True)
        stored.copied = self._streams.event("copy_out")
        if stored.copied is None:
            stored.source = None
        else:
            self._leaving.append(stored)
        return stored

    def prefetch(self, stored: Stored) -> None:
        """Start copying back to the device."""
        if stored.fetched is not None:
            return
        stored.fetched = torch.empty(stored.shape, dtype=stored.dtype, device=self._device)
        with self._streams.after_compute("copy_in"):
            stored.fetched.copy_(stored.view(), non_blocking=True)
        stored.arrived = self._streams.event("copy_in")

    def fetch(self, stored: Stored) -> Tensor:
        """Return the tensor on the device and give its slab back for reuse."""
        self.prefetch(stored)
        self._streams.wait(stored.arrived)
        tensor, stored.fetched = stored.fetched, None
        if tensor is None:
            raise AssertionError("prefetch has just set it")
        self._free.setdefault(stored.slab.numel(), []).append(stored.slab)
        return tensor

    def _take(self, size: int) -> Tensor:
        free = self._free.get(size)
        if free:
            return free.pop()
        slab = torch.empty(size, dtype=torch.uint8)
        self._recorder.mark("host", slab)
        if self._device.type == "cuda":
            code = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), size, 0)
            if int(code) != 0:
                raise MemoryError(
                    f"{size} bytes of host memory could not be page-locked (cudaHostRegister error {int(code)}); "
                    "raise the memlock limit or use a machine with more host memory"
                )
        self.bytes += size
        return slab

    def _release_copied(self) -> None:
        """Drop sources whose copies were queued before this call; compute waits for them before reusing the memory."""
        for stored in self._leaving:
            self._streams.wait(stored.copied)
            stored.source = None
        self._leaving.clear()
