"""`cpbench sweep`: flags and scenario to a plan, the plan to records, the records to a summary."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

from cpbench import slurm
from cpbench.case import Device, Mode
from cpbench.cli import flags
from cpbench.cli.case_flags import (
    HOW_TO_RUN,
    WHERE_IT_GOES,
    WHICH_CASES,
    BatchFlag,
    DtypeFlag,
    HardwareFlag,
    HostRamFlag,
    JsonFlag,
    MethodFlag,
    ModelFlag,
    OptionFlag,
    PluginFlag,
    RunsFlag,
    SeqlenFlag,
    StackFlag,
    StackOptionFlag,
    WorldFlag,
)
from cpbench.cli.request import SweepRequest, plan_request
from cpbench.cli.submit import submit
from cpbench.cli.sweep_text import print_next, print_plan, print_result_as_json
from cpbench.errors import UsageError
from cpbench.estimate_pool import EstimatePool
from cpbench.expand import chosen_mode
from cpbench.machine import usable_cpus
from cpbench.progress import make_display
from cpbench.run_folder import RunFolder, checked_name, default_name
from cpbench.scenario import Scenario
from cpbench.summary import print_summary
from cpbench.sweep import Sweep
from cpbench.units import parse_bytes

_MODES = ("auto", *get_args(Mode))
_LAUNCHERS = ("local", "slurm")
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
            rich_help_panel=WHICH_CASES,
        ),
    ] = None,
    method: MethodFlag = None,
    model: ModelFlag = None,
    seqlen: SeqlenFlag = None,
    world: WorldFlag = None,
    batch: BatchFlag = None,
    dtype: DtypeFlag = None,
    stack: StackFlag = None,
    stack_option: StackOptionFlag = None,
    option: OptionFlag = None,
    plugin: PluginFlag = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="auto, measure, emulate (one rank of the world runs alone on one device) or estimate (over fake "
            "tensors). auto measures if the visible GPUs suffice or the device is cpu, else emulates if there is a "
            "GPU, else estimates.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="cpu|cuda",
            help="cpu: ranks are processes on this machine.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = None,
    hardware: HardwareFlag = None,
    host_ram: HostRamFlag = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            min=0,
            metavar="K",
            help="The rank that is emulated or estimated. Default: 0.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            min=1,
            metavar="N",
            help="Run N layers of each model; the record says so. Default: all.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, metavar="N", help="Timed steps. Default: 3.", rich_help_panel=HOW_TO_RUN
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            "--warmup",
            min=0,
            metavar="N",
            help="Steps before the timed ones. Default: 2.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            metavar="N",
            help="Seed of weights and tokens. Default: 0.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help="End a case that takes longer. Default: 1800.",
            rich_help_panel=HOW_TO_RUN,
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
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = None,
    node_rank: Annotated[
        int,
        typer.Option(
            "--node-rank",
            min=0,
            metavar="K",
            help="This machine's number; 0 writes the records.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = 0,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(
            "--rdzv-endpoint",
            metavar="HOST:PORT",
            help="Where node 0 can be reached, with --nodes above 1.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = None,
    launcher: Annotated[
        str,
        typer.Option(
            "--launcher",
            metavar="local|slurm",
            help="slurm: write an sbatch script that measures on --nodes machines, and submit it.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = "local",
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch",
            metavar="OPTION",
            help="One more option of the Slurm job, like --sbatch=--partition=gpu, --sbatch=--exclusive or "
            "--sbatch=--cpus-per-task=32; repeatable.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="RUN",
            help="Name of the run. Default: time and scenario.",
            rich_help_panel=WHERE_IT_GOES,
        ),
    ] = None,
    runs: RunsFlag = Path("runs"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run --name: finished cases are kept, errors and timeouts run again. "
            "Alone with --name it takes everything else from the run.",
            rich_help_panel=WHERE_IT_GOES,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List the cases, and why some are unsupported, or print the Slurm script; "
            "run and write nothing.",
            rich_help_panel=WHERE_IT_GOES,
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run every case of a scenario, or of the flags, and keep a record of each."""
    axes = flags.axes(
        method=method,
        model=model,
        seqlen=seqlen,
        world=world,
        batch=batch,
        dtype=dtype,
        stack=stack,
        plugins=plugin or (),
    )
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
        axes=axes,
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
        raise typer.Exit(submit(request, context, dry_run=dry_run, as_json=as_json))
    if request.sbatch:
        raise UsageError(f"--sbatch {request.sbatch[0]!r} needs --launcher slurm")
    if dry_run:
        print_plan(plan_request(request)[0], as_json=as_json)
        return
    raise typer.Exit(_sweep(request, as_json))


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
        print_result_as_json(plan, result)
    else:
        print_summary(result.records, console)
    print_next(request, result, console)
    return result.exit_code
