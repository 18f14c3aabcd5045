"""Whose code a frame runs, wherever things are installed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pydantic
import pytest
import torch

import cpbench
import methods
from cpbench.memory.frames import belongs, is_ours


@pytest.mark.parametrize(
    ("file", "ours"),
    [
        ("cpbench/model/block.py", True),
        ("methods/ring.py", True),
        ("mine.py", True),
        (".venv/lib/python3.11/site-packages/torch/_ops.py", False),
        (".venv/lib/python3.11/site-packages/typing_extensions.py", False),
    ],
)
def test_a_checkout_named_cpbench_has_torch_beneath_it(file: str, ours: bool) -> None:
    """As the README has it: `git clone`, `cd cpbench`, and an environment inside."""
    checkout = "/home/me/cpbench/"
    foreign = (f"{checkout}.venv/lib/python3.11/site-packages/torch/", "/usr/lib/python3.11/")

    assert belongs(checkout + file, (f"{checkout}cpbench/", f"{checkout}methods/ring.py"), foreign) == ours


@pytest.mark.parametrize(
    ("file", "ours"),
    [("cpbench/train.py", True), ("methods/ring.py", True), ("torch/_ops.py", False), ("numpy/a.py", False)],
)
def test_an_installation_lies_in_pythons_own_folder(file: str, ours: bool) -> None:
    """The wheel, installed without an environment."""
    packages = "/usr/lib/python3.11/site-packages/"
    foreign = (f"{packages}torch/", "/usr/lib/python3.11/")

    assert belongs(packages + file, (f"{packages}cpbench/", f"{packages}methods/ring.py"), foreign) == ours


def test_what_is_here_is_told_apart() -> None:
    """The real files: ours, a plug-in's, torch's, other packages', Python's, and code that has no file."""
    assert is_ours(str(Path(cpbench.__file__).parent / "train.py"))
    assert is_ours(str(Path(methods.__file__ or "").parent / "ring.py"))
    assert is_ours("/somewhere/plugin.py")
    for foreign in (torch.nn.functional.__file__, pydantic.__file__, contextlib.__file__, "<string>"):
        assert not is_ours(foreign or "")
