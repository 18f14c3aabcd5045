"""What holds for every test: threads, and which tests run first when several processes share them."""

from __future__ import annotations

import os

import pytest

# Several processes run tests side by side, and tensors are tiny: more threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: a long one that starts last would leave the other processes idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
