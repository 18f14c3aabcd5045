"""What a running case says of its progress: a small file that rank 0 writes and the orchestrator reads."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cpbench.record import write_text_atomically

_NAME = "progress.json"


class Progress(BaseModel):
    """Where a case is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: str
    done: int
    total: int
    time: float
    """Unix time of writing."""


def write_progress(scratch: Path, *, phase: str, done: int, total: int, now: float) -> None:
    """Write the progress of a case; `done` of `total` steps are complete."""
    progress = Progress(phase=phase, done=done, total=total, time=now)
    write_text_atomically(scratch / _NAME, json.dumps(progress.model_dump()))


def read_progress(scratch: Path) -> Progress | None:
    """Return the last progress, or None when there is none (yet)."""
    try:
        return Progress.model_validate_json((scratch / _NAME).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None
