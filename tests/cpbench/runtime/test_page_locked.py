"""Page-locked memory, with CUDA's runtime replaced by one that writes down what it is asked for."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from cpbench.runtime.page_locked import page_locked


@dataclass
class Driver:
    """Refuses a range that overlaps a locked one, as the driver does, page by page."""

    locked: dict[int, int] = field(default_factory=dict)
    failing: bool = False

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        """Lock."""
        assert address % mmap.PAGESIZE == 0
        assert size % mmap.PAGESIZE == 0
        if self.failing:
            return 2
        if any(a < address + size and address < a + s for a, s in self.locked.items()):
            return 712
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        """Unlock."""
        del self.locked[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    yield made
    gc.collect()


def test_many_small_blocks_share_no_page(driver: Driver) -> None:
    """Each is locked by itself, whole pages, and can be written to its last byte."""
    blocks = [page_locked(size) for size in (1, 100, 4096, 5000, 3 * 2**20)]
    for number, block in enumerate(blocks):
        block.fill_(number + 1)
    assert [block.numel() for block in blocks] == [1, 100, 4096, 5000, 3 * 2**20]
    assert len(driver.locked) == 5
    assert all((block == number + 1).all() for number, block in enumerate(blocks))


def test_the_last_reference_unlocks(driver: Driver) -> None:
    """A view keeps the pages; when it goes too, they are unlocked before they are unmapped."""
    block = page_locked(8192)
    view = block.view(torch.float32)[:7]
    del block
    gc.collect()
    assert len(driver.locked) == 1
    view.fill_(3.0)
    del view
    gc.collect()
    assert driver.locked == {}


def test_pages_that_cannot_be_locked(driver: Driver) -> None:
    """The message names the size, the error and the way out; nothing stays locked."""
    driver.failing = True
    with pytest.raises(
        MemoryError, match=r"70000 bytes .* page-locked \(cudaHostRegister error 2\); raise the memlock"
    ):
        page_locked(70000)
    assert driver.locked == {}


def test_more_memory_than_there_is(driver: Driver) -> None:
    """A MemoryError, and not the system's."""
    with pytest.raises(MemoryError, match="could not be had"):
        page_locked(2**60)
