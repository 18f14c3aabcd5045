"""Host memory for what leaves the device: exact-size slabs, page-locked for CUDA, reused, and counted.

A slab is registered with the driver once and handed out again to tensors of the same size, because registering is
slow and because torch's own pinned allocator rounds up to powers of two.  `peak_bytes` is the third memory budget.

Ordering on CUDA.  A copy out waits for all compute queued before it, and its source lives until compute has been made
to wait for the copy: at the next `store`, or when something is read back.  A copy in waits for compute too, because its
buffer may be memory that earlier compute still reads, and for the copy out of what it reads; reading makes compute
wait for the copy.  So a slab given up by `drop` is overwritten only after everything read from it has arrived.

In an estimate a tile may stand for many (`cpbench.runtime.tiles`).  What it stores takes slabs for all of them, and
dropping that gives all of them back.  That is exact where a tile gives back slabs of a size before it takes some.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cpbench.runtime.page_locked import page_locked
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.streams import Streams
from cpbench.runtime.tiles import tile_times


@dataclass(slots=True, eq=False)
class Stored:
    """A tensor in host memory."""

    slab: Tensor  # [nbytes] uint8
    shape: torch.Size
    dtype: torch.dtype
    others: list[Tensor] = field(default_factory=list)
    """Slabs that only count: those of the tiles for which the one that stored it stands."""
    copied: torch.cuda.Event | None = None
    """When the copy out is complete."""
    source: Tensor | None = None
    """Kept until then."""
    arrived: torch.cuda.Event | None = None
    fetched: Tensor | None = None

    def view(self) -> Tensor:
        """The stored tensor, in host memory."""
        return self.slab.view(self.dtype).view(self.shape)


@dataclass(slots=True, eq=False)
class Loading:
    """Rows of a stored tensor on their way to the device."""

    tensor: Tensor
    arrived: torch.cuda.Event | None


class HostPool:
    """Stores tensors in host memory on the copy-out stream and brings them back on the copy-in stream."""

    def __init__(
        self, device: torch.device, streams: Streams, recorder: Recorder, *, asynchronous: bool | None = None
    ) -> None:
        """Make an empty pool.

        Args:
            device: where tensors come from.
            streams: of the step.
            recorder: told which storages are host memory.
            asynchronous: sources outlive the call that stores them, as on CUDA (the default there); an estimate for
                CUDA asks for it although its fake tensors are on no device.
        """
        self._device = device
        self._streams = streams
        self._recorder = recorder
        self._asynchronous = device.type == "cuda" if asynchronous is None else asynchronous
        self._free: dict[int, list[Tensor]] = {}
        self._leaving: list[Stored] = []
        self.bytes = 0
        """Bytes of all slabs."""

    @property
    def peak_bytes(self) -> int:
        """Most bytes ever held; slabs are kept for reuse, so it equals what is held."""
        return self.bytes

    def store(self, t: Tensor) -> Stored:
        """Start copying a tensor out; it may be dropped by the caller at once, but not overwritten."""
        self._release_copied()
        others, slab = self._take(t.numel() * t.element_size(), tile_times())
        stored = Stored(slab=slab, shape=t.shape, dtype=t.dtype, others=others)
        self._copy_out(t, stored)
        return stored

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Stored:
        """Return a tensor of zeros that never was on the device."""
        others, slab = self._take(math.prod(shape) * dtype.itemsize, tile_times())
        stored = Stored(slab=slab, shape=torch.Size(shape), dtype=dtype, others=others)
        stored.view().zero_()
        return stored

    def overwrite(self, stored: Stored, t: Tensor) -> None:
        """Start copying a tensor of the same shape and dtype to where one lies that has been read; see `store`."""
        self._release_copied()
        self._copy_out(t, stored)

    def _copy_out(self, t: Tensor, stored: Stored) -> None:
        stored.source = t
        with self._streams.after_compute("copy_out"):
            stored.view().copy_(t, non_blocking=True)
        stored.copied = self._streams.event("copy_out")
        if self._asynchronous:
            self._leaving.append(stored)
        else:
            stored.source = None

    def prefetch(self, stored: Stored) -> None:
        """Start copying back to the device."""
        if stored.fetched is not None:
            return
        loading = self._load(stored, stored.view())
        stored.fetched, stored.arrived = loading.tensor, loading.arrived

    def read(self, stored: Stored) -> Tensor:
        """Return the tensor on the device; it stays in host memory too."""
        self._release_copied()
        self.prefetch(stored)
        self._streams.wait(stored.arrived)
        tensor, stored.fetched = stored.fetched, None
        if tensor is None:
            raise AssertionError("prefetch has just set it")
        return tensor

    def fetch(self, stored: Stored) -> Tensor:
        """Return the tensor on the device and give its slab back for reuse."""
        tensor = self.read(stored)
        self.drop(stored)
        return tensor

    def drop(self, stored: Stored) -> None:
        """Give the slab back for reuse; the stored tensor is lost."""
        free = self._free.setdefault(stored.slab.numel(), [])
        free[:0] = stored.others
        free.append(stored.slab)

    def load_rows(self, stored: Stored, rows: slice, total: int) -> Loading:
        """Start copying some rows of a tensor, seen as `[total, -1]`, to the device; see `arrive`."""
        return self._load(stored, stored.view().view(total, -1)[rows])

    def arrive(self, loading: Loading) -> Tensor:
        """Return loaded rows."""
        self._release_copied()
        self._streams.wait(loading.arrived)
        return loading.tensor

    def _load(self, stored: Stored, source: Tensor) -> Loading:
        tensor = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        with self._streams.after_compute("copy_in"):
            self._streams.wait(stored.copied)  # makes the copy-in stream wait: it is the current one here
            tensor.copy_(source, non_blocking=True)
        return Loading(tensor, self._streams.event("copy_in"))

    def _take(self, size: int, count: int) -> tuple[list[Tensor], Tensor]:
        """Return slabs, free or new: those that only count, and the one to write to."""
        free = self._free.setdefault(size, [])
        if not free:  # made by itself: of what shares an allocation, a time model takes all for written
            free += self._new(size, 1)
        slab = free.pop()
        if len(free) < count - 1:
            free[:0] = self._new(size, count - 1 - len(free))
        others, free[: count - 1] = free[: count - 1], []
        return others, slab

    def _new(self, size: int, count: int) -> list[Tensor]:
        total = size * count
        block = page_locked(total) if self._device.type == "cuda" else torch.empty(total, dtype=torch.uint8)
        self._recorder.mark("host", block)
        self.bytes += total
        return [block] if count == 1 else list(block.split(size))

    def _release_copied(self) -> None:
        """Drop sources whose copies were queued before this call; compute waits for them before reusing the memory."""
        for stored in self._leaving:
            self._streams.wait(stored.copied)
            stored.source = None
        self._leaving.clear()
