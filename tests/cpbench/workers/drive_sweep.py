"""Runs a sweep of fake cases as a process of its own, so that a test can kill it.

Usage: drive_sweep.py FOLDER ACT[,ACT...] [--resume]
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from cpbench.case import Case
from cpbench.expand import Plan, ResolvedCase
from cpbench.mode import ModeChoice
from cpbench.model_config import PRESETS
from cpbench.progress import PlainDisplay
from cpbench.run_folder import RunFolder
from cpbench.scenario import Scenario
from cpbench.sweep import Sweep


def main(folder: str, acts: str, *rest: str) -> int:
    cases = [
        Case(
            method="single",
            options={"act": act},
            model="tiny",
            architecture=PRESETS["tiny"],
            seq_len=1024 + k,
            world_size=2,
            dtype="float32",
        )
        for k, act in enumerate(acts.split(","))
    ]
    plan = Plan(
        scenario=Scenario(name="fake"),
        choice=ModeChoice("measure", "cpu", "a test"),
        cases=tuple(ResolvedCase(case=case) for case in cases),
    )
    sweep = Sweep(
        plan=plan,
        folder=RunFolder(Path(folder)),
        command=("cpbench", "sweep", "--fake"),
        display=PlainDisplay(plan, Console()),
        resume="--resume" in rest,
        worker=(str(Path(__file__).with_name("fake_worker.py")),),
    )
    return sweep.run().exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
