"""Hands a sweep to Slurm: an sbatch script that starts the same command, launched locally, on every node.

The script runs in the folder of the submission and everything in it that came from the user is quoted.  What the
devices of the compute nodes allow is found out there: the machine that submits may have none.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpbench.disk import refusing_bad_disk
from cpbench.errors import UsageError
from cpbench.expand import Plan
from cpbench.record import write_text_atomically
from cpbench.run_folder import SBATCH_FILE, RunFolder
from cpbench.scenario import Scenario

_SPARE_SECONDS = 300.0  # for imports and for the tables at the end, which no case's limit covers
_OPTION = re.compile(r"--[a-z][a-z0-9-]*([= ].*)?")
_OURS = frozenset({"--nodes", "--ntasks", "--ntasks-per-node", "--array", "--chdir", "--wrap"})
# The number of a node is known only on that node, so a shell there adds it to the command it is given.
_ON_NODE = 'exec "$@" --node-rank="$SLURM_NODEID"'


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """A sweep as a job: what it asks of the cluster and the command of each node."""

    command: tuple[str, ...]
    """Of a node; without its number and the rendezvous, which are known when the job runs."""
    folder: Path
    """Of the run, absolute; it gets the script and the job's output."""
    directory: Path
    """Where the command runs, so that relative paths in it mean the same as on the command line."""
    nodes: int
    gpus_per_node: int
    """0 on device cpu."""
    cases: int
    """Those that run."""
    timeout_seconds: float
    """Of one case."""
    extra: tuple[str, ...] = ()
    """More sbatch options; they come last and so override those before."""

    @property
    def minutes(self) -> int:
        """Time limit of the job: every case may take all of its own."""
        return math.ceil((self.timeout_seconds * self.cases + _SPARE_SECONDS) / 60)


def pinned(scenario: Scenario) -> Scenario:
    """Return the scenario as a job runs it: measured, and on cuda unless a device is given.

    Raises:
        UsageError: its mode needs no cluster.
    """
    run = scenario.run
    if run.mode not in ("auto", "measure"):
        raise UsageError(
            f"--launcher slurm only measures, but the mode is {run.mode!r}; "
            "use --mode measure, or --launcher local, which needs no cluster for it"
        )
    if not math.isfinite(run.timeout_seconds):
        raise UsageError(
            f"--timeout {run.timeout_seconds} gives the job no time limit; choose a number of seconds"
        )
    return scenario.model_copy(
        update={"run": run.model_copy(update={"mode": "measure", "device": run.device or "cuda"})}
    )


def checked_extra(options: Sequence[str]) -> tuple[str, ...]:
    """Return sbatch options that may stand on a line of the script.

    Raises:
        UsageError: one is no long option, has more than one line, or is set by cpbench.
    """
    for option in options:
        if not _OPTION.fullmatch(option) or not option.isprintable():
            raise UsageError(
                f"--sbatch {option!r} is not one long option of sbatch on one line, like --partition=gpu"
            )
        name = re.split("[= ]", option, maxsplit=1)[0]
        if name in _OURS:
            raise UsageError(f"--sbatch {option!r}: cpbench sets {name} itself; use --nodes and --world")
    return tuple(options)


def make_job(plan: Plan, folder: RunFolder, command: Sequence[str], extra: Sequence[str]) -> SlurmJob:
    """Return the job that runs a plan.

    Args:
        plan: of a scenario that `pinned` returned.
        folder: of the run.
        command: of a node, see `SlurmJob`.
        extra: more sbatch options.

    Raises:
        UsageError: an option in `extra`, or the folder's path, cannot stand in a script.
    """
    path = folder.path.absolute()
    if not str(path).isprintable() or "\\" in str(path):
        raise UsageError(
            f"run folder {str(path)!r} has a backslash or an unprintable character, which sbatch cannot take "
            "in --output; choose another --runs"
        )
    cases = [item.case for item in plan.cases if not item.unsupported]
    nodes = plan.scenario.run.nodes or 1
    world = max(case.world_size for case in cases)
    return SlurmJob(
        command=tuple(command),
        folder=path,
        directory=Path.cwd(),
        nodes=nodes,
        gpus_per_node=world // nodes if plan.choice.device == "cuda" else 0,
        cases=len(cases),
        timeout_seconds=plan.scenario.run.timeout_seconds,
        extra=checked_extra(extra),
    )


def script_text(job: SlurmJob) -> str:
    """Return the sbatch script of a job."""
    # Slurm reads quotes on #SBATCH lines as a shell does, and % in file names as the start of a placeholder.
    output = str(job.folder).replace("%", "%%") + "/slurm-%j.log"
    options = [
        f"--job-name={shlex.quote(job.folder.name)}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        f"--time={job.minutes}",
        f"--output={shlex.quote(output)}",
        "--no-requeue",  # a second start would find the run there; --resume continues it
        *job.extra,
    ]
    # A node that ends first, with whatever code, leaves the others the time of the case that they are in.
    wait = math.ceil(job.timeout_seconds + _SPARE_SECONDS)
    srun = f"srun --kill-on-bad-exit=0 --wait={wait}"
    command = shlex.join(job.command)
    body = [
        "set -euo pipefail",
        f"cd -- {shlex.quote(str(job.directory))}",
        "# srun takes the cores of a task from its own variable only.",
        'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi',
    ]
    if job.nodes == 1:
        body.append(f"{srun} {command}")
    else:
        body += [
            'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            "head=${hosts%%$'\\n'*}",
            "port=$((20000 + SLURM_JOB_ID % 20000))",
            f'{srun} bash -c {shlex.quote(_ON_NODE)} cpbench {command} --rdzv-endpoint="$head:$port"',
        ]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "", *body]
    return "\n".join(lines) + "\n"


def write_script(job: SlurmJob) -> Path:
    """Write the script into the run's folder and return its path.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    path = job.folder / SBATCH_FILE
    with refusing_bad_disk(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, script_text(job))
    return path


def submit(script: Path) -> str:
    """Submit a script and return the id of its job.

    Raises:
        UsageError: there is no sbatch here, or it refused; the script stays.
    """
    by_hand = f"submit it by hand with: sbatch {shlex.quote(str(script))}"
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UsageError(
            f"sbatch is not on PATH, so nothing was submitted; the script is {script}; "
            f"on a machine that has Slurm {by_hand}"
        )
    done = subprocess.run(
        [sbatch, "--parsable", str(script)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.split()
    job_id = lines[-1].partition(";")[0] if lines else ""  # a federation adds ";cluster"
    if done.returncode != 0 or not job_id.isdecimal():
        said = (done.stderr.strip() or done.stdout.strip() or "nothing")[-1000:]
        raise UsageError(
            f"sbatch ended with code {done.returncode} and said: {said}\n"
            f"The script is {script}; mend it with --sbatch OPTION, or {by_hand}"
        )
    return job_id


__all__ = [
    "SlurmJob",
    "checked_extra",
    "make_job",
    "pinned",
    "script_text",
    "submit",
    "write_script",
]
