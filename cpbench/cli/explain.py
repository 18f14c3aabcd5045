"""`cpbench explain`: what is alive at the peak of a case, and why; of several cases, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.text import Text

from cpbench.case import Case, Device
from cpbench.cli import flags
from cpbench.cli.case_flags import (
    HOW_TO_RUN,
    WHERE_IT_GOES,
    WHICH_CASES,
    BatchFlag,
    DtypeFlag,
    HardwareFlag,
    HostRamFlag,
    JsonNoFilesFlag,
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
from cpbench.cli.explain_text import print_explanations
from cpbench.cli.request import check_options
from cpbench.disk import require_writable
from cpbench.errors import UsageError
from cpbench.explain import CaseCannotRun, cases_of_run, explain
from cpbench.explanation import Explanation
from cpbench.report.explanation import write_explanation
from cpbench.scenario import build_scenario
from cpbench.units import parse_bytes

EXAMPLES = """
[bold]Examples[/bold]

cpbench explain --method upipe --seqlen 1M

cpbench explain --method ulysses,upipe --seqlen 4M

cpbench explain my-run upipe-1M
"""
_MOST_CASES = 16


def explain_(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run: folder, or name in --runs.")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Argument(metavar="CASE", help="Some of its cases: the beginning of a case id is enough."),
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
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="cpu|cuda", help="What the estimate stands for.", rich_help_panel=WHICH_CASES
        ),
    ] = "cuda",
    hardware: HardwareFlag = None,
    host_ram: HostRamFlag = None,
    no_options: Annotated[
        bool,
        typer.Option(
            "--no-options", help="Do not estimate again with other stack options.", rich_help_panel=HOW_TO_RUN
        ),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of explain.html and explain.png.",
            rich_help_panel=WHERE_IT_GOES,
        ),
    ] = Path("explain"),
    runs: RunsFlag = Path("runs"),
    as_json: JsonNoFilesFlag = False,
) -> None:
    """Say what is alive at the memory peak of a case, and why; of two or more cases, side by side."""
    asked = flags.axes(
        method=method,
        model=model,
        seqlen=seqlen,
        world=world,
        batch=batch,
        dtype=dtype,
        stack=stack,
        plugins=plugin or (),
    )
    plugins: tuple[Path, ...] = tuple(path.absolute() for path in plugin or ())
    if run is not None:
        if asked or option or stack_option or plugin or hardware or host_ram is not None:
            raise UsageError("name a RUN with its CASE, or describe cases by flags, not both")
        cases, plugins = cases_of_run(_folder(run, runs), case or [])
        if not cases:
            raise UsageError("name the CASE too: the beginning of its id is enough")
    else:
        raw = build_scenario({}).model_dump(exclude_none=True)
        raw["sweep"] |= asked
        raw["run"] |= {"mode": "estimate"}
        raw["run"] |= {} if hardware is None else {"hardware": hardware}
        raw["run"] |= {} if host_ram is None else {"host_memory_bytes": parse_bytes(host_ram)}
        raw["options"] = flags.option_sets(option)
        check_options(raw["options"], raw["sweep"]["method"], plugins)
        raw["stack"] |= flags.stack_changes(stack_option)
        chosen = flags.choice("--device", device, get_args(Device))
        cases = build_scenario(raw).expand(mode="estimate", device="cpu" if chosen == "cpu" else "cuda")
    if len(cases) > _MOST_CASES:
        raise UsageError(f"these are {len(cases)} cases; explain takes at most {_MOST_CASES}")
    if not as_json:
        require_writable(out, flag="--out")
    found = _explained(cases, plugins, options=not no_options)
    if as_json:
        typer.echo(json.dumps([e.model_dump(mode="json") for e in found], indent=1))
        return
    console = Console()
    print_explanations(found, console)
    for path, what in zip(write_explanation(found, out), ("page", "picture"), strict=True):
        console.print(Text(f"{what}: {path}"), soft_wrap=True)


def _explained(cases: Sequence[Case], plugins: Sequence[Path], *, options: bool) -> list[Explanation]:
    """Every case that can run, in order; what runs, and what cannot, shows on standard error."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        return _each(cases, plugins, options, lambda words: errors.print(Text(words), soft_wrap=True), errors)
    with errors.status("resolving") as status:
        return _each(cases, plugins, options, lambda words: status.update(Text(words)), errors)


def _each(
    cases: Sequence[Case],
    plugins: Sequence[Path],
    options: bool,
    said: Callable[[str], None],
    errors: Console,
) -> list[Explanation]:
    found, problems = [], []
    for number, case in enumerate(cases, start=1):
        place = f"[{number}/{len(cases)}] " if len(cases) > 1 else ""
        try:
            found.append(explain(case, plugins, options=options, said=partial(_placed, said, place)))
        except CaseCannotRun as error:
            problems.append(str(error))
    if not found:
        raise UsageError("\n  ".join(problems))
    for problem in problems:
        errors.print(Text(f"left out: {problem}"), soft_wrap=True)
    return found


def _placed(said: Callable[[str], None], place: str, words: str) -> None:
    said(place + words)


def _folder(text: str, runs: Path) -> Path:
    for folder in (Path(text), runs / text):
        if folder.is_dir():
            return folder
    raise UsageError(f"run {text!r} is neither a folder nor a run in {runs}")
