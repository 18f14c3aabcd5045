"""What a reader needs to trace a record to the code that made it: versions and the git commit."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import cpbench

_PACKAGES = (
    "torch",
    "numpy",
    "pydantic",
    "pandas",
    "pyarrow",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "flash-attn",
)


def versions() -> dict[str, str]:
    """Return the versions of cpbench and of the packages that decide a number, where installed."""
    found = {"cpbench": cpbench.__version__}
    for name in _PACKAGES:
        version = package_version(name)
        if version is not None:
            found[name] = version
    return found


def package_version(name: str) -> str | None:
    """Return the version of an installed package without importing it, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of the cpbench checkout, with `-dirty` when files differ from it; None in a wheel."""
    root = Path(cpbench.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
