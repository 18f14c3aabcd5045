"""Real runs of many small cases in one launch, for tests that compare them with something counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cpbench.case import Case
from cpbench.model.tiling import TILES
from cpbench.record import RankReport
from tests.cpbench.torchrun import run_ranks

_WORKER = Path(__file__).parent / "workers" / "measure_many.py"


def measure(
    cases: Sequence[Case], folder: Path, *, parts_tile: int = TILES.parts, timeout: float = 280
) -> list[list[RankReport]]:
    """Return the reports of all ranks for each case; all have the same world size.

    Args:
        cases: resolved.
        folder: for the files of this launch.
        parts_tile: elements of a tile, see `cpbench.model.tiling.Tiles.parts`.
        timeout: seconds for all cases together.
    """
    world_size = cases[0].world_size
    assert all(case.world_size == world_size for case in cases)
    file = folder / "cases.json"
    job = {"cases": [case.model_dump(mode="json") for case in cases], "parts_tile": parts_tile}
    file.write_text(json.dumps(job), encoding="utf-8")
    root = Path(__file__).resolve().parents[2]
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),
        "PATH": "/usr/bin:/bin",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    run_ranks(_WORKER, [str(file), str(folder)], ranks=world_size, environment=environment, timeout=timeout)
    ranks = [
        [RankReport.model_validate(report) for report in json.loads((folder / f"rank{r}.json").read_text())]
        for r in range(world_size)
    ]
    return [list(reports) for reports in zip(*ranks, strict=True)]
