"""Whose code a stack frame runs: FSDP's, that of torch and other packages, or ours: cpbench, a method or a plug-in.

By where packages are installed, never by a name in a path: a checkout in a folder `cpbench` has torch beneath it too.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

import torch

import cpbench
from cpbench import registry

FSDP = "torch/distributed/fsdp/"
"""Part of the path of every file of FSDP."""
_INSTALLED = ("/site-packages/", "/dist-packages/")


_PLUMBING = (
    "/runtime/collectives.py",
    "/runtime/kernels.py",
    "/runtime/host_pool.py",
    "/runtime/ring_attention.py",
)
_REDUCE = ("post_backward", "foreach_reduce", "reduce_scatter")
_DEEPEST = 60


def site(frames: Iterable[tuple[str, int, str]]) -> str:
    """Return the line of ours that made an allocation, and whether FSDP did.

    A line of a method or of the model says more than the line of the kernel or collective that it called.

    Args:
        frames: file, line and function, innermost first.
    """
    ours, fsdp, plumbing = "", "", ""
    for file, number, function in islice(frames, _DEEPEST):
        if FSDP in file and not fsdp.startswith("FSDP::reduce"):
            reduce = any(part in function for part in _REDUCE)
            fsdp = "FSDP::reduce" if reduce else "FSDP::all_gather"
        elif is_ours(file):
            line = f"{file.rsplit('/', 1)[-1]}:{number} {function}"
            if not file.endswith(_PLUMBING):
                ours = line
                break
            plumbing = plumbing or line
    return " > ".join(part for part in (ours or plumbing, fsdp) if part)


@cache
def is_ours(file: str) -> bool:
    """Return whether a file, named as in `co_filename`, is cpbench's, a method's or a plug-in's."""
    return belongs(file, *_folders())


def belongs(file: str, ours: Sequence[str], foreign: Sequence[str]) -> bool:
    """Return whether a file is ours: one of ours by name, or in none of others' folders and not installed.

    Args:
        file: its path.
        ours: the folder of cpbench, with a slash at the end, and the files of methods; they may be installed.
        foreign: folders of torch and of Python.
    """
    if file.startswith(tuple(ours)):
        return True
    return not (file.startswith(("<", *foreign)) or any(part in file for part in _INSTALLED))


@cache
def _folders() -> tuple[tuple[str, ...], tuple[str, ...]]:
    # A method is one file, and one that is installed may lie beside torch: so files, not their folders.
    files = (str(path) for path in registry.method_files().values())
    foreign = (Path(torch.__file__).parent, sysconfig.get_paths()["stdlib"])
    return (f"{Path(cpbench.__file__).parent}/", *files), tuple(f"{folder}/" for folder in foreign)
