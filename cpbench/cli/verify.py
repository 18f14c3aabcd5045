"""`cpbench verify`: is a method right?"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, get_args

import typer

from cpbench.case import Device, Dtype
from cpbench.cli import flags
from cpbench.verification import Verification, VerifyReport

EXAMPLES = (
    "Examples: [bold]cpbench verify[/] checks every method at 4 ranks. "
    "[bold]cpbench verify --method upipe --world 8 --heads 16 --kv-heads 2[/] one method, fewer KV heads than ranks. "
    "[bold]cpbench verify --method mine --plugin mine.py --dtype bfloat16[/] your own method."
)
_PANEL_SHAPE = "Shape"


def verify(
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Method name; repeat or use commas; `all` is the default."),
    ] = None,
    world: Annotated[
        int, typer.Option("--world", help="Ranks, real processes.", rich_help_panel=_PANEL_SHAPE)
    ] = 4,
    heads: Annotated[int, typer.Option("--heads", help="Query heads.", rich_help_panel=_PANEL_SHAPE)] = 8,
    kv_heads: Annotated[
        int, typer.Option("--kv-heads", help="KV heads; must divide --heads.", rich_help_panel=_PANEL_SHAPE)
    ] = 4,
    head_dim: Annotated[
        int, typer.Option("--head-dim", help="Width of a head, even.", rich_help_panel=_PANEL_SHAPE)
    ] = 32,
    hidden: Annotated[
        int, typer.Option("--hidden", help="Width of the residual stream.", rich_help_panel=_PANEL_SHAPE)
    ] = 192,
    layers: Annotated[
        int, typer.Option("--layers", help="Blocks of the whole-model check.", rich_help_panel=_PANEL_SHAPE)
    ] = 2,
    seqlen: Annotated[
        str | None,
        typer.Option(
            "--seqlen",
            help="Sequence length, like 1K; default 26 tokens a rank.",
            rich_help_panel=_PANEL_SHAPE,
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences.", rich_help_panel=_PANEL_SHAPE)] = 1,
    qk_norm: Annotated[
        bool,
        typer.Option("--qk-norm", help="Norm queries and keys, as Qwen3 does.", rich_help_panel=_PANEL_SHAPE),
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help=f"One of {', '.join(get_args(Dtype))}.")] = "float32",
    device: Annotated[str, typer.Option("--device", help=f"One of {', '.join(get_args(Device))}.")] = "cpu",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="method.field=value; several values check each."),
    ] = None,
    plugin: Annotated[
        list[Path] | None, typer.Option("--plugin", help="Python file of a further method.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of inputs and weights.")] = 0,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for one launch.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Compare methods with the reference in real processes.

    Output, gradients of x and of every attention weight against textbook attention; a causality probe; loss and
    gradient norm of the whole model over three optimizer steps against `single`. float32 must agree to 1e-5;
    bfloat16 may have 1.5 times the error of `ulysses`. Exit code 1 if anything fails.
    """
    from cpbench import registry
    from cpbench.interrupt import Interrupt
    from cpbench.units import parse_length
    from cpbench.verify import VerifyRequest
    from cpbench.verify import verify as run

    plugins = tuple(plugin or ())
    names = flags.split(method) or ["all"]
    sizes = {"--world": world, "--heads": heads, "--kv-heads": kv_heads, "--head-dim": head_dim}
    sizes |= {"--hidden": hidden, "--layers": layers, "--batch": batch}
    for flag, value in sizes.items():
        flags.counts(flag, [str(value)])
    request = VerifyRequest(
        methods=tuple(dict.fromkeys(registry.method_files(plugins) if "all" in names else names)),
        options={
            name: [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
            for name, fields in flags.option_sets(option).items()
        },
        world_size=world,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_dim=hidden,
        num_layers=layers,
        seq_len=None if seqlen is None else parse_length(seqlen),
        batch_size=batch,
        qk_norm=qk_norm,
        dtype=flags.choice("--dtype", dtype, get_args(Dtype)),  # type: ignore[arg-type]  # checked just here
        device=flags.choice("--device", device, get_args(Device)),  # type: ignore[arg-type]  # checked just here
        seed=seed,
        plugins=plugins,
        timeout_seconds=timeout,
    )
    with Interrupt() as interrupt:
        report = run(request, should_stop=lambda: interrupt.came)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        _print(report)
    if not report.passed:
        raise typer.Exit(1)


def _print(report: VerifyReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shape = ", ".join(f"{key} {value}" for key, value in report.shape.items())
    console.print(f"Relative errors against the reference ({shape})", highlight=False)
    table = Table()
    for column in ("method", "verdict", "out", "gradients", "causality", "loss", "grad norm"):
        table.add_column(
            column, justify="left" if column in ("method", "verdict") else "right", no_wrap=column != "method"
        )
    for result in report.results:
        table.add_row(
            *_row(result), style=None if result.verdict == "pass" else "bold red" if result.checks else "dim"
        )
    baselines = {check.name: check.baseline for result in report.results for check in result.checks}
    if any(value is not None for value in baselines.values()):
        table.add_section()
        table.add_row("baseline: ulysses", "", *_errors(baselines), style="dim")
    console.print(table)
    for result in report.results:
        if result.reason:
            console.print(f"{_title(result)}: {result.reason}", markup=False, highlight=False)


def _row(result: Verification) -> list[str]:
    return [
        _title(result, "\n  "),
        result.verdict,
        *_errors({check.name: check.error for check in result.checks}),
    ]


def _errors(by_check: dict[str, float | None]) -> list[str]:
    """The worst error of each group of checks: output, gradients, causality, loss, gradient norm."""
    groups: list[list[float | None]] = [[], [], [], [], []]
    for name, error in by_check.items():
        position = {"out": 0, "causality": 2}.get(
            name, 3 if name.startswith("loss") else 4 if " " in name else 1
        )
        groups[position].append(error)
    return [_worst(group) for group in groups]


def _worst(errors: list[float | None]) -> str:
    if not errors:
        return "-"
    known = [error for error in errors if error is not None]
    return "not finite" if len(known) < len(errors) else f"{max(known):.1e}"


def _title(result: Verification, separator: str = " ") -> str:
    return separator.join([result.method, *(f"{key}={value}" for key, value in result.options.items())])
