"""Measures many cases of one world size in one launch: `torchrun ... measure_many.py cases.json folder`.

`cases.json` is `{"cases": [resolved case...], "parts_tile": elements}`; `folder/rank<k>.json` gets a
list of this rank's reports in the same order.  Starting ranks costs more than a small case does,
so tests over many shapes start them once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from cpbench import registry, train
from cpbench.case import Case
from cpbench.model.tiling import TILES
from cpbench.train import World
from cpbench.worker import leave
from cpbench.world.measure import parallel_groups
from cpbench.world.run import CaseRun


def main(cases_file: str, folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    reports = []
    job = json.loads(Path(cases_file).read_text(encoding="utf-8"))
    train.TILES = replace(
        TILES, parts=job["parts_tile"]
    )  # small cases need small tiles, or one tile is all there is
    for raw in job["cases"]:
        case = Case.model_validate(raw)
        method = registry.load(case.method, case.options)
        ulysses, ring = parallel_groups(rank, method.layout(case, 0))
        world = World(rank=rank, mesh=mesh, ulysses=ulysses, ring=ring, device=torch.device("cpu"))
        run = CaseRun(case, world, Path(folder))
        reports.append(run.report(run.traced(method)).model_dump(mode="json"))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(reports), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
