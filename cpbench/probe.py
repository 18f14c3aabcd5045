"""`python -m cpbench.probe`: one JSON line saying what this machine's torch can really do.

The doctor runs it in a process of its own, because a broken driver or library may end the process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist


def main() -> None:
    """Try what a sweep needs and print the findings."""
    cuda = torch.cuda.is_available()
    findings = {
        "torch": torch.__version__,
        "cuda_built": torch.version.cuda,
        "cuda_devices": torch.cuda.device_count() if cuda else 0,
        "gloo": _problem(lambda: _all_reduce("gloo", "cpu"))
        if dist.is_gloo_available()
        else "not in this torch build",
        "nccl": _nccl(cuda),
    }
    sys.stdout.write(json.dumps(findings) + "\n")


def _nccl(cuda: bool) -> str | None:
    if not dist.is_nccl_available():
        return "not in this torch build"
    return _problem(lambda: _all_reduce("nccl", "cuda")) if cuda else "needs a GPU that torch can use"


def _problem(attempt: Callable[[], None]) -> str | None:
    """None when it works, else the reason in one line."""
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _all_reduce(backend: str, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            dist.all_reduce(torch.ones(1, device=device))
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
