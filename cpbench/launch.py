"""Starts the processes of one case under torchrun and waits for them: the border between the two halves.

What crosses the border are files in the case's scratch folder: `job.json` goes in; `report.json` (rank 0, on
success), `failure-rank<k>.json` and `progress.json` come out.  Each rank writes its own log; torchrun's words
are in `launcher.log`.  This module knows no statuses; `cpbench.outcome` says what an ended launch means.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import cpbench
from cpbench.case import Case
from cpbench.disk import refusing_bad_disk
from cpbench.machine import threads_of_rank
from cpbench.record import write_text_atomically
from cpbench.supervise import GRACE_SECONDS

WORKER = ("-m", "cpbench.worker")
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What torch reads the settings of its CUDA allocator from.  Without expandable segments, which long contexts are
trained with, cached memory that no tensor fits into can take as much again as the tensors."""
POLL_SECONDS = 0.1
"""Between two looks at what runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """This machine's place among the machines of a sweep; the same command is started on each."""

    count: int = 1
    rank: int = 0
    """Records are written on node rank 0, which also hosts the rendezvous."""
    endpoint: str | None = None
    """host:port of node rank 0, passed through to torchrun."""


ONE_NODE = Nodes()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One case, ready to be started."""

    case: Case
    scratch: Path
    """Folder for the files that cross the border; made by `launch`, removed by `clean`."""
    log_dir: Path
    timeout_seconds: float
    plugins: tuple[Path, ...] = ()
    nodes: Nodes = ONE_NODE
    worker: Sequence[str] = WORKER
    """What each rank runs, in torchrun's words: `-m module` or the path of a script; it gets job.json."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """More keys of job.json, for workers that need them."""

    @property
    def launcher_log(self) -> Path:
        """What torchrun itself said."""
        suffix = f"-node{self.nodes.rank}" if self.nodes.rank else ""
        return self.log_dir / f"launcher{suffix}.log"

    @property
    def folder(self) -> Path:
        """This node's part of the scratch folder; nodes may share a file system."""
        return self.scratch / f"node{self.nodes.rank}"

    @property
    def local_world_size(self) -> int:
        """Processes on this machine: an emulated or estimated case is one process, whatever its world."""
        return self.case.world_size // self.nodes.count if self.case.mode == "measure" else 1

    @property
    def by_torchrun(self) -> bool:
        """Whether torchrun starts the ranks; an emulated or estimated case is one process, and spares its seconds."""
        return self.case.mode == "measure"

    def clean(self) -> None:
        """Remove the scratch files of all nodes."""
        shutil.rmtree(self.scratch, ignore_errors=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """How a launch ended."""

    code: int
    """The exit code of torchrun or of the one process, or 128 + signal."""
    timed_out: bool
    interrupted: bool
    duration_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What a running case says of itself."""

    phase: str
    done: int
    total: int


def launch(job: Job, *, should_stop: Callable[[], bool], on_wait: Callable[[], None] = lambda: None) -> Exit:
    """Run a case to its end; afterwards none of its processes is left, however it ended.

    Args:
        job: the case and where its files go.
        should_stop: asked ten times a second; True ends the whole tree.
        on_wait: called as often, for a display.
    """
    with refusing_bad_disk(job.scratch):
        job_file = prepare(job)
    command = [sys.executable, "-m", "cpbench.supervise", *job_command(job), str(job_file)]
    start = time.monotonic()
    with job.launcher_log.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # the supervisor's lifeline: it ends everything when this pipe closes
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(job),
            start_new_session=True,
        )
        timed_out = interrupted = False
        try:
            while process.poll() is None and not (timed_out or interrupted):
                _sleep(process)
                timed_out = time.monotonic() - start > job.timeout_seconds
                interrupted = should_stop()
                on_wait()
        finally:
            code = end_supervised(process)
    return Exit(
        code=code,
        timed_out=timed_out and code != 0,
        interrupted=interrupted and code != 0,
        duration_seconds=time.monotonic() - start,
    )


def job_command(job: Job) -> list[str]:
    """Return the command line that runs a job, without the job file."""
    return torchrun_command(job) if job.by_torchrun else [sys.executable, *job.worker]


def torchrun_command(job: Job) -> list[str]:
    """Return the torchrun command line for a job, without the job file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(job.local_world_size)]
    if job.nodes.count > 1 and job.case.mode == "measure":
        # The static rendezvous keeps node rank 0's ranks first; c10d would order the nodes by host name.
        command += ["--nnodes", str(job.nodes.count), "--node-rank", str(job.nodes.rank)]
        command += ["--rdzv-backend", "static", "--rdzv-endpoint", str(job.nodes.endpoint)]
        command += ["--rdzv-id", f"{job.scratch.parent.parent.name}-{job.case.case_id}"]
    else:
        command += [
            "--standalone",
            "--local-addr",
            "localhost",
        ]  # a free port of its own; no host name look-up
    # Without a folder of ours torchrun makes one in /tmp for every launch, and leaves it there.
    return [*command, "--log-dir", str(job.folder / "torchrun"), "--max-restarts", "0", *job.worker]


def read_progress(job: Job) -> Progress | None:
    """Return the last progress rank 0 told, or None before the first."""
    try:
        raw = json.loads((job.folder / "progress.json").read_text(encoding="utf-8"))
        return Progress(phase=str(raw["phase"]), done=int(raw["done"]), total=int(raw["total"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def child_environment(local_world_size: int | None, *, single_node: bool) -> dict[str, str]:
    """Return the environment of measured processes: the user's, made independent of the caller's folder.

    Args:
        local_world_size: processes that share this machine's cores; None for one that stands for ranks elsewhere and
            sets its threads by itself.
        single_node: gloo then stays on the loopback interface.
    """
    environment = dict(os.environ)
    if local_world_size is not None:
        environment["OMP_NUM_THREADS"] = str(threads_of_rank(local_world_size))
    environment["PYTHONSAFEPATH"] = "1"  # a folder `methods` in the user's directory must not shadow ours
    root = Path(cpbench.__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file():  # a checkout that may not be installed
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = str(root) + (os.pathsep + inherited if inherited else "")
    if not any(name in environment for name in _ALLOCATOR_SETTINGS):
        environment[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
    if single_node and Path("/sys/class/net/lo").exists():
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _environment(job: Job) -> dict[str, str]:
    """The environment of a job's processes; torchrun tells ranks the rest."""
    single = job.nodes.count == 1
    if job.by_torchrun:
        return child_environment(job.local_world_size, single_node=single)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return child_environment(None, single_node=single) | alone


def prepare(job: Job) -> Path:
    """Make a job's folders, without what an earlier attempt left, write job.json and return its path."""
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    job.log_dir.mkdir(parents=True, exist_ok=True)
    for stale in job.log_dir.glob("*.log") if job.nodes.count == 1 else ():
        stale.unlink()
    body = {
        "case": job.case.model_dump(mode="json"),
        "plugins": [str(path) for path in job.plugins],
        "scratch": str(job.folder),
        "log_dir": str(job.log_dir),
        **job.extra,
    }
    job_file = job.folder / "job.json"
    write_text_atomically(job_file, json.dumps(body, indent=1))
    return job_file


def _sleep(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=POLL_SECONDS)


def end_supervised(process: subprocess.Popen[bytes]) -> int:
    """Cut the lifeline and wait; should the supervisor not manage, kill what can still be seen."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        code = process.wait(timeout=2 * GRACE_SECONDS + 5)
    except subprocess.TimeoutExpired:
        for member in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.kill()
        code = process.wait()
    return code if code >= 0 else 128 - code
