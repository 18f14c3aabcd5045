"""Host memory that the GPU copies from and to directly: pages of its own, locked as long as the tensor lives.

Memory from the C library will not do.  The driver locks whole pages, so two small blocks that share one cannot both be
locked (cudaHostRegister's error 712); and a block that is freed while it is locked leaves the driver with a mapping of
pages that the library hands out again.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_HUGE = 2**21
"""Bytes of a huge page on x86-64."""


def page_locked(size: int) -> Tensor:
    """Return `[size]` uint8 in page-locked host memory, given back to the system with its last reference.

    Raises:
        MemoryError: the pages could not be had or locked; the message says what to do.
    """
    return torch.frombuffer(_LockedPages(size), dtype=torch.uint8, count=size)


class _LockedPages(mmap.mmap):
    """Anonymous pages, locked from here to the end of the mapping."""

    _address: int = 0
    """Where they are, once they are locked."""

    def __new__(cls, size: int) -> _LockedPages:
        """Map and lock."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            pages = super().__new__(cls, -1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, flags=flags)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryError(f"{size} bytes of host memory could not be had: {error}") from error
        if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them; fewer pages are locked faster
                pages.madvise(mmap.MADV_HUGEPAGE)
        address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(address, len(pages), 0))
        if code != 0:
            raise MemoryError(
                f"{size} bytes of host memory could not be page-locked (cudaHostRegister error {code}); "
                "raise the memlock limit or use a machine with more host memory"
            )
        pages._address = address
        return pages

    def __del__(self) -> None:
        """Unlock, when no copy is under way any more."""
        if self._address:
            with contextlib.suppress(Exception):  # at the end of the process, CUDA may be gone
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaHostUnregister(self._address)
