"""Where the data folders are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

import cpbench


def scenario_folders() -> list[Path]:
    """Return the folders in which a scenario's name is looked up."""
    return [folder for folder in _candidates("scenarios") if folder.is_dir()][:1]


def published_folder() -> Path:
    """Return the folder of the published results; it need not exist."""
    inside, beside = (folder / "published" for folder in _candidates("results"))
    return inside if inside.is_dir() else beside


def _candidates(name: str) -> tuple[Path, Path]:
    package = Path(cpbench.__file__).resolve().parent
    return package / f"_{name}", package.parent / name
