"""`cpbench plan`: which method, and how long a context fits."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.text import Text

from cpbench import registry
from cpbench.case import Dtype
from cpbench.cli import flags
from cpbench.cli.case_flags import (
    WHERE_IT_GOES,
    WHICH_CASES,
    HostRamFlag,
    JsonNoFilesFlag,
    PluginFlag,
    WorldFlag,
)
from cpbench.context_plan import Configuration, ContextPlan, MethodPlan, Point, Question
from cpbench.disk import refusing_bad_disk, require_writable
from cpbench.errors import without_name
from cpbench.estimates import PooledEstimates
from cpbench.hardware import HOST_MARGIN, HOST_PROCESS_BYTES, Hardware, load_hardware, nodes_of
from cpbench.model_config import load_model
from cpbench.plan import plan_context
from cpbench.planned_run import duration_words, scenario_text, sweep_command, torchrun_line
from cpbench.report.plan_picture import write_plan_picture
from cpbench.text_table import Row, TextColumn, TextTable
from cpbench.units import format_bytes, format_length, format_rate, format_seconds, parse_bytes, parse_length

EXAMPLES = """
[bold]Examples[/bold]

cpbench plan

cpbench plan --model llama3-70b --world 32 --hardware h200 --seqlen 1M

cpbench plan --method ulysses,upipe --world 8,16,32,64 --host-ram 1T
"""


def plan(
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="M,...",
            help="Methods, see `cpbench list methods`. Default: all.",
            rich_help_panel=WHICH_CASES,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="M",
            help="Preset, see `cpbench list models`, or path of a Hugging Face config.json file.",
            rich_help_panel=WHICH_CASES,
        ),
    ] = "llama3-8b",
    world: WorldFlag = None,
    hardware: Annotated[
        str,
        typer.Option(
            "--hardware",
            metavar="H",
            help="Machine profile, see `cpbench list hardware`.",
            rich_help_panel=WHICH_CASES,
        ),
    ] = "h100-80g",
    host_ram: HostRamFlag = None,
    seqlen: Annotated[
        str | None,
        typer.Option(
            "--seqlen",
            metavar="S",
            help="Also: the fastest way to train this length, and the command for it.",
            rich_help_panel=WHICH_CASES,
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option("--batch", metavar="N", min=1, help="Sequences per step.", rich_help_panel=WHICH_CASES),
    ] = 1,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", metavar="float32|bfloat16", help="Compute dtype.", rich_help_panel=WHICH_CASES
        ),
    ] = "bfloat16",
    plugin: PluginFlag = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of plan.png, plan.json and recommended.toml, the scenario to run.",
            rich_help_panel=WHERE_IT_GOES,
        ),
    ] = Path("plan"),
    as_json: JsonNoFilesFlag = False,
) -> None:
    """Find the longest context of every method on a machine, and what to run for a length; all by estimate."""
    plugins = tuple(path.absolute() for path in plugin or ())
    name, architecture = load_model(model)
    profile = load_hardware(hardware)
    question = Question(
        methods=_methods(flags.methods(method, plugins), plugins),
        model=name,
        architecture=architecture,
        worlds=tuple(dict.fromkeys(flags.counts("--world", world))) or (8,),
        hardware=hardware,
        host_memory_bytes=profile.host_memory_bytes if host_ram is None else parse_bytes(host_ram),
        seq_len=None if seqlen is None else parse_length(seqlen),
        batch_size=batch,
        dtype="float32" if flags.choice("--dtype", dtype, get_args(Dtype)) == "float32" else "bfloat16",
    )
    for ranks in question.worlds:
        nodes_of(ranks, profile)
    if not as_json:
        require_writable(out, flag="--out")
    found = _found(question, profile, plugins)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    console = Console()
    _print(console, found)
    files = _Files(out, model, host_ram, plugins)
    with refusing_bad_disk(out, flag="--out"):
        _print_recommendation(console, found, files)
        picture = write_plan_picture(found, out / "plan.png")
        (out / "plan.json").write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    console.print(Text(f"picture: {picture}"), soft_wrap=True)
    console.print(Text(f"all numbers: {out / 'plan.json'}"), soft_wrap=True)


def _methods(asked: Sequence[str], plugins: Sequence[Path]) -> tuple[str, ...]:
    known = registry.method_files(plugins)
    for name in asked:
        registry.require(name, plugins)
    return tuple(dict.fromkeys(asked)) or tuple(known)


def _found(question: Question, profile: Hardware, plugins: Sequence[Path]) -> ContextPlan:
    """The answer; what is done shows on standard error."""
    errors = Console(stderr=True)
    with PooledEstimates(plugins) as estimates:

        def search(said: Callable[[str], None]) -> ContextPlan:
            return plan_context(question, profile, estimates, plugins=plugins, said=said)

        if not errors.is_terminal:
            return search(lambda words: errors.print(Text(words), soft_wrap=True))
        total = len(question.methods) * len(question.worlds)
        with errors.status(f"estimating {total} searches, about 10 s each") as status:

            def said(words: str) -> None:
                errors.print(Text(words))
                status.update(Text("estimating"))

            return search(said)


def _print(console: Console, found: ContextPlan) -> None:
    q = found.question
    uncertainty, margin = _uncertainty(found), load_hardware(q.hardware).margin
    console.print(
        Text(
            f"\nLongest context of {q.model} on {q.hardware}, {format_bytes(q.host_memory_bytes)} host memory a node, "
            f"{q.dtype}, batch {q.batch_size}: estimated",
            style="bold",
        )
    )
    for ranks in q.worlds:
        plans = [plan for plan in found.methods if plan.world_size == ranks]
        nodes = plans[0].nodes
        console.print(
            Text(
                f"\n{ranks} ranks on {nodes} node{'s' * (nodes > 1)}, "
                f"to {format_length(found.step_tokens[ranks])} tokens"
            )
        )
        console.print(_longest_table(plans))
        if q.seq_len is not None:
            console.print(Text(f"\nat {format_length(q.seq_len)}, with the fastest options that fit"))
            console.print(_asked_table(plans))
    console.print(
        Text(
            f"device: what a rank needs, with a margin of {margin:.0%}, context, communicators and segments; "
            f"host: what a node needs, with {HOST_MARGIN:.0%} of its memory for the system and "
            f"{format_bytes(HOST_PROCESS_BYTES)} for "
            "each rank's process"
            + (
                f"; step and tokens/s (a rank) are modelled, to {uncertainty:.0%}"
                if uncertainty
                else "; the profile has no rates, so no times are modelled"
            ),
            style="dim",
        )
    )


_NUMBERS = (
    TextColumn("device"),
    TextColumn("host/node", narrow="host\n/node"),
    TextColumn("step"),
    TextColumn("tokens/s"),
)


def _longest_table(plans: Sequence[MethodPlan]) -> TextTable:
    rows = []
    for plan in sorted(plans, key=lambda plan: -(plan.longest.seq_len if plan.longest else 0)):
        if plan.longest is None:
            numbers: tuple[str, ...] = ("-",) * 5
            then = (
                f"{plan.ended_by}: {without_name(plan.reason, plan.method)}" if plan.reason else plan.ended_by
            )
        else:
            numbers = (format_length(plan.longest.seq_len), *_numbers(plan.longest))
            then = f"then {_then(plan)}"
        rows.append(_row(plan.method, plan.configuration, numbers, then))
    return TextTable([TextColumn("method", right=False), TextColumn("longest"), *_NUMBERS], rows)


def _asked_table(plans: Sequence[MethodPlan]) -> TextTable:
    rows = []
    for plan in sorted(plans, key=lambda plan: _order(plan.asked)):
        point = plan.asked
        if point is None:
            numbers: tuple[str, ...] = ("-",) * 5
            why = without_name(plan.asked_reason or plan.reason or plan.ended_by, plan.method)
        else:
            numbers = (*_numbers(point), "-" if point.mfu is None else f"{point.mfu:.1%}")
            why = "fits" if point.status == "ok" else _short(point)
        rows.append(_row(plan.method, plan.asked_configuration, numbers, why))
    return TextTable([TextColumn("method", right=False), *_NUMBERS, TextColumn("MFU")], rows)


def _row(method: str, configuration: Configuration | None, numbers: Sequence[str], ending: str) -> Row:
    """A method's numbers; what differs from its defaults, and what ends it, in words that may wrap."""
    options = "" if configuration is None else _words(configuration)
    note = Text(options, style="dim").append("; " if options else "", style="dim")
    return Row((method, *numbers), note.append_text(Text(ending, style="not dim")))


def _order(point: Point | None) -> tuple[int, float]:
    if point is None:
        return 2, 0.0
    return int(point.status != "ok"), -(point.tokens_per_second_per_gpu or 0.0)


def _numbers(point: Point) -> tuple[str, str, str, str]:
    return (
        format_bytes(point.device_needed_bytes),
        format_bytes(point.host_needed_bytes),
        format_seconds(point.step_seconds),
        format_rate(point.tokens_per_second_per_gpu),
    )


def _then(plan: MethodPlan) -> str:
    if plan.too_long is not None:
        return _short(plan.too_long)
    return f"{plan.ended_by}: {without_name(plan.reason, plan.method)}" if plan.reason else plan.ended_by


def _short(point: Point) -> str:
    """`device memory: 1.2 GiB short`."""
    what, _, rest = (point.reason or "").partition(": ")
    missing = rest.rpartition("short by ")[2]
    return f"{what}: {missing} short" if missing else what


def _words(configuration: Configuration) -> str:
    """Options for people; the host budget is that of the question."""
    stack = {key: value for key, value in configuration.stack.items() if key != "host_budget_bytes"}
    return configuration.model_copy(update={"stack": stack}).words


def _uncertainty(found: ContextPlan) -> float | None:
    points = [point for plan in found.methods for point in (plan.longest, plan.asked) if point is not None]
    return next((point.uncertainty for point in points if point.uncertainty is not None), None)


class _Files:
    """What the recommendation needs to name or write."""

    def __init__(self, out: Path, model: str, host_ram: str | None, plugins: Sequence[Path]) -> None:
        self.out = out
        self.model = model
        self.host_ram = host_ram
        self.plugins = tuple(plugins)


def _print_recommendation(console: Console, found: ContextPlan, files: _Files) -> None:
    choice = found.recommended
    console.print()
    if choice is None:
        console.print(Text(_nothing(found), style="bold"))
        return
    point, q = choice.point, found.question
    options = _words(choice.configuration)
    what = f"{choice.configuration.method} with {options}" if options else choice.configuration.method
    why = "the fastest that fits" if q.seq_len is not None else "the longest context"
    device = format_bytes(found.device_memory_bytes - point.device_needed_bytes)
    host = format_bytes(q.host_memory_bytes - point.host_needed_bytes)
    console.print(
        Text(
            f"recommended for {format_length(point.seq_len)} on {choice.world_size} ranks: {what} "
            f"({why}; {device} of device memory left, {host} of host memory)",
            style="bold",
        )
    )
    if choice.alike:
        console.print(Text(f"no slower within the uncertainty of the time model: {', '.join(choice.alike)}"))
    console.print("\nto run it where the GPUs are:")
    command = sweep_command(q, choice, model=files.model, host_ram=files.host_ram, plugins=files.plugins)
    console.print(Text(f"  {shlex.join(command)}"), soft_wrap=True)
    console.print(Text(duration_words(choice)))
    console.print("it launches, on each node:")
    console.print(Text(f"  {torchrun_line(choice)}"), soft_wrap=True)
    path = files.out / "recommended.toml"
    text = scenario_text(q, choice, model=files.model, host_ram=files.host_ram)
    path.write_text(text, encoding="utf-8")
    console.print(Text(f"the same as a scenario: {path}"), soft_wrap=True)


def _nothing(found: ContextPlan) -> str:
    """What is missing when nothing fits."""
    q = found.question
    asked = [plan.asked for plan in found.methods if plan.asked is not None]
    if q.seq_len is not None and not asked:
        multiples = {found.step_tokens[ranks] for ranks in q.worlds if q.seq_len % found.step_tokens[ranks]}
        steps = sorted(format_length(tokens) for tokens in multiples)
        hint = f"; every method takes multiples of {' or '.join(steps)}" if multiples else ""
        return f"no method can run {format_length(q.seq_len)} here; the table says why{hint}"
    if q.seq_len is None:
        return "nothing fits on this machine at any length: use more ranks (--world), or a larger --hardware"
    nearest = min(asked, key=lambda point: point.device_needed_bytes)
    longest = max((plan.longest.seq_len for plan in found.methods if plan.longest), default=0)
    shorter = f", or train {format_length(longest)} at most" if longest else ""
    return (
        f"nothing fits {format_length(q.seq_len)}; the nearest lacks {_short(nearest).removesuffix(' short')}. "
        f"Use more ranks (--world {2 * max(q.worlds)}), more host memory, a larger --hardware{shorter}"
    )


__all__ = ["EXAMPLES", "plan"]
