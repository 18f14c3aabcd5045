"""`cpbench sweep`: flags and scenario to a plan, the plan to records, the records to a summary."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.text import Text

from cpbench import slurm
from cpbench.case import STACKS, Device, Dtype, Mode
from cpbench.cli import flags
from cpbench.cli.request import SweepRequest, plan_request
from cpbench.errors import UsageError
from cpbench.estimate_pool import EstimatePool
from cpbench.expand import Plan, chosen_mode
from cpbench.machine import usable_cpus
from cpbench.progress import headline, make_display
from cpbench.run_folder import RunFolder, checked_name, default_name
from cpbench.scenario import Scenario
from cpbench.summary import print_cases, print_summary
from cpbench.sweep import INCOMPLETE_EXIT, Sweep, SweepResult
from cpbench.units import parse_bytes

_MODES = ("auto", *get_args(Mode))
_LAUNCHERS = ("local", "slurm")
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
_WHAT, _HOW, _WHERE = "What to run", "How to run it", "Where it goes"
EXAMPLES = """
[bold]Examples[/bold]

cpbench sweep --scenario smoke

cpbench sweep --method ring,ulysses,upipe --model tiny --seqlen 4K,8K --world 4 --device cpu --dtype float32

cpbench sweep --method upipe --option upipe.stage_heads=8,16 --seqlen 128K --dry-run

cpbench sweep --resume --name 20260101-120000-smoke

cpbench sweep --method upipe --world 16 --nodes 2 --launcher slurm --sbatch=--partition=gpu

Exit codes: 0 done, 2 wrong usage, 3 a case ended in error or timeout, 130/143 interrupted.
"""


def sweep(
    context: typer.Context,
    scenario: Annotated[
        str | None,
        typer.Option(
            "--scenario",
            metavar="NAME|FILE",
            help="Scenario by name or TOML file; flags override it.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="M,...",
            help="Methods, see `cpbench list methods`, or `all`. Default: upipe.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="M,...",
            help="Presets, see `cpbench list models`, or paths of Hugging Face config.json files. "
            "Default: llama3-8b.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    seqlen: Annotated[
        list[str] | None,
        typer.Option(
            "--seqlen",
            metavar="S,...",
            help="Sequence lengths in tokens: 4096, 128K, 5M (K = 1024). Default: 128K.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    world: Annotated[
        list[str] | None,
        typer.Option("--world", metavar="N,...", help="Numbers of ranks. Default: 8.", rich_help_panel=_WHAT),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            "--batch", metavar="N,...", help="Sequences per step. Default: 1.", rich_help_panel=_WHAT
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="float32|bfloat16",
            help="Compute dtypes; a list with commas is allowed. Default: bfloat16.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    stack: Annotated[
        list[str] | None,
        typer.Option(
            "--stack",
            metavar="plain|checkpoint|long",
            help="What surrounds attention: nothing special; full checkpointing; checkpointing with inputs "
            "offloaded and everything tiled. A list with commas is allowed. Default: long.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    stack_option: Annotated[
        list[str] | None,
        typer.Option(
            "--stack-option",
            metavar="FIELD=VALUE",
            help="Change of the stack: checkpoint, offload, tile_mlp, tile_norm, tile_loss, optimizer_offload, "
            "save_attention or host_budget_bytes; repeatable.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="METHOD.FIELD=VALUE",
            help="Option of a method; several values with commas are one more axis.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin",
            metavar="FILE",
            help="Python file of a method outside the tree; repeatable.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="auto, measure, emulate (one rank of the world runs alone on one device) or estimate (over fake "
            "tensors). auto measures if the visible GPUs suffice or the device is cpu, else emulates if there is a "
            "GPU, else estimates.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="cpu|cuda",
            help="cpu: ranks are processes on this machine.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="H",
            help="Machine profile of estimates, and of the communication of emulated cases. Default: h100-80g.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    host_ram: Annotated[
        str | None,
        typer.Option(
            "--host-ram",
            metavar="SIZE",
            help="Host memory of a node that estimates are for, like 2T or 512G. Default: the profile's.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            min=0,
            metavar="K",
            help="The rank that is emulated or estimated. Default: 0.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            min=1,
            metavar="N",
            help="Run N layers of each model; the record says so. Default: all.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, metavar="N", help="Timed steps. Default: 3.", rich_help_panel=_HOW),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            "--warmup",
            min=0,
            metavar="N",
            help="Steps before the timed ones. Default: 2.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, metavar="N", help="Seed of weights and tokens. Default: 0.", rich_help_panel=_HOW
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help="End a case that takes longer. Default: 1800.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes",
            min=1,
            metavar="N",
            help="Machines; to measure, start the same command on each. Default: 1; where no ranks run, the nodes that "
            "they would fill.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    node_rank: Annotated[
        int,
        typer.Option(
            "--node-rank",
            min=0,
            metavar="K",
            help="This machine's number; 0 writes the records.",
            rich_help_panel=_HOW,
        ),
    ] = 0,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(
            "--rdzv-endpoint",
            metavar="HOST:PORT",
            help="Where node 0 can be reached, with --nodes above 1.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    launcher: Annotated[
        str,
        typer.Option(
            "--launcher",
            metavar="local|slurm",
            help="slurm: write an sbatch script that measures on --nodes machines, and submit it.",
            rich_help_panel=_HOW,
        ),
    ] = "local",
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch",
            metavar="OPTION",
            help="One more option of the Slurm job, like --sbatch=--partition=gpu, --sbatch=--exclusive or "
            "--sbatch=--cpus-per-task=32; repeatable.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="RUN",
            help="Name of the run. Default: time and scenario.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    runs: Annotated[
        Path, typer.Option("--runs", metavar="DIR", help="Folder of the runs.", rich_help_panel=_WHERE)
    ] = Path("runs"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run --name: finished cases are kept, errors and timeouts run again. "
            "Alone with --name it takes everything else from the run.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List the cases, and why some are unsupported, or print the Slurm script; "
            "run and write nothing.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print JSON on standard output; progress goes to standard error.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
) -> None:
    """Run every case of a scenario, or of the flags, and keep a record of each."""
    axes = {
        "method": flags.methods(method, plugin or ()),
        "model": flags.split("--model", model),
        "seq_len": flags.lengths("--seqlen", seqlen),
        "world_size": flags.counts("--world", world),
        "batch_size": flags.counts("--batch", batch),
        "dtype": [
            str(flags.choice("--dtype", item, get_args(Dtype))) for item in flags.split("--dtype", dtype)
        ],
        "stack": [str(flags.choice("--stack", item, STACKS)) for item in flags.split("--stack", stack)],
    }
    run = {
        "mode": flags.choice("--mode", mode, _MODES),
        "device": flags.choice("--device", device, get_args(Device)),
        "hardware": hardware,
        "host_memory_bytes": None if host_ram is None else parse_bytes(host_ram),
        "rank": rank,
        "layers": layers,
        "steps": steps,
        "warmup": warmup,
        "seed": seed,
        "timeout_seconds": timeout,
        "nodes": nodes,
    }
    request = SweepRequest(
        scenario=scenario,
        axes={key: values for key, values in axes.items() if values},
        run={key: value for key, value in run.items() if value is not None},
        options=flags.option_sets(option),
        stack=flags.stack_changes(stack_option),
        plugins=tuple(plugin or ()),
        name=name,
        runs=runs,
        resume=resume,
        node_rank=node_rank,
        endpoint=rdzv_endpoint,
        slurm=flags.choice("--launcher", launcher, _LAUNCHERS) == "slurm",
        sbatch=slurm.checked_extra(sbatch or ()),
    )
    if request.slurm:
        raise typer.Exit(_submit(request, _typed(context), dry_run=dry_run, as_json=as_json))
    if request.sbatch:
        raise UsageError(f"--sbatch {request.sbatch[0]!r} needs --launcher slurm")
    raise typer.Exit(_dry_run(request, as_json) if dry_run else _sweep(request, as_json))


def _dry_run(request: SweepRequest, as_json: bool) -> int:
    plan, _ = plan_request(request)
    if as_json:
        body = {
            "mode": plan.choice.mode,
            "device": plan.choice.device,
            "reason": plan.choice.reason,
            "cases": [
                {
                    "case_id": item.case.case_id,
                    "unsupported": item.unsupported,
                    "case": item.case.model_dump(mode="json"),
                }
                for item in plan.cases
            ],
        }
        typer.echo(json.dumps(body, indent=1))
        return 0
    console = Console()
    console.print(Text(headline(plan)), soft_wrap=not console.is_terminal)
    print_cases([*plan.cases], console)
    return 0


def _sweep(request: SweepRequest, as_json: bool) -> int:
    name = None if request.name is None else checked_name(request.name)
    with EstimatePool() as pool:

        def parsed(scenario: Scenario) -> None:
            # Loading torch for estimates takes as long as resolving their cases; both at once where there are cores.
            if usable_cpus() > 1 and chosen_mode(scenario).mode == "estimate":
                pool.warm()

        plan, nodes = plan_request(request, parsed=parsed)
        folder = RunFolder(request.runs / (name or default_name(plan.scenario.name, request.runs)))
        console = Console(stderr=as_json)
        task = Sweep(
            plan=plan,
            folder=folder,
            command=("cpbench", *sys.argv[1:]),
            display=make_display(plan, console),
            resume=request.resume,
            nodes=nodes,
            pool=pool,
        )
        result = task.run()
    if as_json:
        typer.echo(json.dumps(_as_json(plan, result), indent=1))
    else:
        print_summary(result.records, console)
    _say_next(request, result, console)
    return result.exit_code


def _submit(request: SweepRequest, typed: list[str], *, dry_run: bool, as_json: bool) -> int:
    """Write and submit the job of a sweep, or only show its script."""
    given = None if request.name is None else checked_name(request.name)
    plan, nodes = plan_request(request)
    name = given or default_name(plan.scenario.name, request.runs)
    folder = RunFolder(request.runs / name)
    folder.check(resume=request.resume)
    command = [sys.executable, "-m", "cpbench", "sweep", *typed, f"--name={name}", "--launcher=local"]
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


def _as_json(plan: Plan, result: SweepResult) -> dict[str, Any]:
    return {
        "run": str(result.folder),
        "mode": plan.choice.mode,
        "device": plan.choice.device,
        "exit_code": result.exit_code,
        "counts": result.counts,
        "remaining": result.remaining,
        "records": [record.model_dump(mode="json", exclude={"ranks"}) for record in result.records],
    }


def _say_next(request: SweepRequest, result: SweepResult, console: Console) -> None:
    """Print where the records are and the command that comes next."""
    counts = ", ".join(f"{number} {status}" for status, number in result.counts.items())
    lines = [f"records: {result.folder}  ({counts or 'none'})"] if request.node_rank == 0 else []
    again = f"cpbench sweep --resume --name {shlex.quote(result.folder.name)}"
    if request.runs != Path("runs"):
        again += f" --runs {shlex.quote(str(request.runs))}"
    if request.endpoint is not None:
        again += f" --node-rank {request.node_rank} --rdzv-endpoint {shlex.quote(request.endpoint)}"
    if result.exit_code > INCOMPLETE_EXIT:
        lines.append(f"interrupted with {result.remaining} cases to go; continue with: {again}")
    elif result.exit_code == INCOMPLETE_EXIT:
        lines.append(f"incomplete; run the failed cases again with: {again}")
    if result.records:
        lines.append(f"next: cpbench report {shlex.quote(str(result.folder))}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)
