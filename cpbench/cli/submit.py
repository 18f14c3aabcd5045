"""`cpbench sweep --launcher slurm`: the command of the job, its script, and its submission."""

from __future__ import annotations

import json
import shlex
import sys

import typer

from cpbench import slurm
from cpbench.cli.request import SweepRequest, plan_request
from cpbench.run_folder import RunFolder, checked_name, default_name

# Flags that a job's command does not take over as typed: about the submission, or decided by it.
_NOT_IN_JOB = frozenset(
    {
        "launcher",
        "sbatch",
        "nodes",
        "node_rank",
        "rdzv_endpoint",
        "mode",
        "device",
        "name",
        "dry_run",
        "as_json",
    }
)


def submit(request: SweepRequest, context: typer.Context, *, dry_run: bool, as_json: bool) -> int:
    """Write and submit the job of a sweep, or only show its script; return the exit code.

    Args:
        request: what the flags ask for.
        context: of the command line, whose flags the job's command repeats.
        dry_run: print the script; write and submit nothing.
        as_json: print JSON instead of text.

    Raises:
        UsageError: flags that do not go together, or there is no sbatch, or it refuses the job.
        RunFolderError: the run is there already, or its folder cannot be written.
    """
    given = None if request.name is None else checked_name(request.name)
    plan, nodes = plan_request(request)
    name = given or default_name(plan.scenario.name, request.runs)
    folder = RunFolder(request.runs / name)
    folder.check(resume=request.resume)
    command = [
        sys.executable,
        "-m",
        "cpbench",
        "sweep",
        *_typed(context),
        f"--name={name}",
        "--launcher=local",
    ]
    if not request.resume or request.says_what:  # else all of this comes from the run
        command += [f"--mode={plan.choice.mode}", f"--device={plan.choice.device}"]
        command += [f"--nodes={nodes.count}"] if nodes.count > 1 or "nodes" in request.run else []
    job = slurm.make_job(plan, folder, command, request.sbatch)
    if dry_run:
        text = slurm.script_text(job)
        typer.echo(json.dumps({"script": text}, indent=1) if as_json else text, nl=as_json)
        return 0
    script = slurm.write_script(job)
    job_id = slurm.submit(script)
    if as_json:
        typer.echo(json.dumps({"run": str(folder.path), "script": str(script), "job_id": job_id}, indent=1))
        return 0
    log = folder.path / f"slurm-{job_id}.log"
    for line in (
        f"submitted job {job_id}: nodes {nodes.count}, cases {job.cases}, at most {job.minutes} minutes",
        f"look at it with: squeue --job {job_id}",
        f"once it runs: tail -f {shlex.quote(str(log))}",
        f"afterwards: cpbench report {shlex.quote(str(folder.path))}",
    ):
        typer.echo(line)
    return 0


def _typed(context: typer.Context) -> list[str]:
    """The flags of this command line that mean the same inside a job."""
    found: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.name in _NOT_IN_JOB or value is None or value is False:
            continue
        flag = parameter.opts[0]
        if value is True:
            found.append(flag)
        else:
            found += [f"{flag}={item}" for item in (value if isinstance(value, list | tuple) else [value])]
    return found
