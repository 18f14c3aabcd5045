"""Runs a sweep of fake cases as a process of its own, so that a test can kill it.

Usage: drive_sweep.py FOLDER ACT[,ACT...] [--resume] [--estimate]
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from cpbench.case import Mode
from cpbench.expand import Plan, ResolvedCase
from cpbench.mode import ModeChoice
from cpbench.progress import PlainDisplay
from cpbench.run_folder import RunFolder
from cpbench.scenario import Scenario
from cpbench.sweep import Sweep
from tests.cpbench.workers.harness import FAKE_ESTIMATE, FAKE_WORKER, cold_pool, fake_case


def main(folder: str, acts: str, *rest: str) -> int:
    estimate = "--estimate" in rest
    mode: Mode = "estimate" if estimate else "measure"
    cases = [fake_case(act, seq_len=1024 + k, mode=mode) for k, act in enumerate(acts.split(","))]
    plan = Plan(
        scenario=Scenario(name="fake"),
        choice=ModeChoice(mode, "cpu", "a test"),
        cases=tuple(ResolvedCase(case=case) for case in cases),
    )
    sweep = Sweep(
        plan=plan,
        folder=RunFolder(Path(folder)),
        command=("cpbench", "sweep", "--fake"),
        display=PlainDisplay(plan, Console()),
        resume="--resume" in rest,
        worker=FAKE_ESTIMATE if estimate else FAKE_WORKER,
        pool=cold_pool(),
    )
    return sweep.run().exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
