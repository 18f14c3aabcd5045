"""Fake cases, jobs and sweeps, and a look at which processes a test left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cpbench.case import Case, Mode
from cpbench.estimate_pool import EstimatePool
from cpbench.launch import Job
from cpbench.model_config import PRESETS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FAKE_WORKER = (str(HERE / "fake_worker.py"),)
FAKE_ESTIMATE = ("-m", "tests.cpbench.workers.fake_worker")
"""The same as a module, which is what an estimate server takes."""
COLD_SERVER = ("-m", "tests.cpbench.workers.cold_server")
TOKEN = "CPBENCH_TEST_TOKEN"


def fake_case(act: str, *, world_size: int = 2, seq_len: int = 1024, mode: Mode = "measure") -> Case:
    return Case(
        method="single",
        options={"act": act},
        model="tiny",
        architecture=PRESETS["tiny"],
        seq_len=seq_len,
        world_size=world_size,
        dtype="float32",
        mode=mode,
    )


def fake_job(folder: Path, act: str, *, timeout_seconds: float = 200.0) -> Job:
    case = fake_case(act)
    return Job(
        case=case,
        scratch=folder / "scratch" / case.case_id,
        log_dir=folder / "logs" / case.case_id,
        timeout_seconds=timeout_seconds,
        worker=FAKE_WORKER,
    )


def fake_estimate(folder: Path, act: str, *, timeout_seconds: float = 200.0) -> Job:
    """A job for an estimate pool; one a folder and act."""
    case = fake_case(act, mode="estimate")
    return Job(
        case=case,
        scratch=folder / "scratch" / case.case_id,
        log_dir=folder / "logs" / case.case_id,
        timeout_seconds=timeout_seconds,
        worker=FAKE_ESTIMATE,
    )


def cold_pool(size: int = 2) -> EstimatePool:
    """A pool whose server loads no torch."""
    return EstimatePool(size, server=COLD_SERVER)


def alive(token: str) -> list[str]:
    """Command lines of all processes but this one that inherited the token, whatever their session."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(TOKEN) == token:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)


def start_sweep(folder: Path, acts: str, token: str, *rest: str) -> subprocess.Popen[str]:
    """Start the sweep of fake cases in `drive_sweep.py` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(HERE / "drive_sweep.py"), str(folder), acts, *rest],
        env=os.environ | {"PYTHONPATH": str(ROOT), TOKEN: token},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def hanging(folder: Path, processes: int = 2) -> bool:
    """Whether both ranks of a hanging fake case, or so many processes, have reached the point where they hang."""
    return len(list(folder.glob("scratch/*/node0/hanging-rank*"))) == processes
