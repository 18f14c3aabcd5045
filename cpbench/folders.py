"""Where the data folders are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

import cpbench


def scenario_folders() -> list[Path]:
    """Return the folders in which a scenario's name is looked up."""
    package = Path(cpbench.__file__).resolve().parent
    candidates = (package / "_scenarios", package.parent / "scenarios")
    return [folder for folder in candidates if folder.is_dir()][:1]
