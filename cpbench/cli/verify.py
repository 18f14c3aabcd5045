"""`cpbench verify`: is a method right?"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from cpbench.case import Device, Dtype
from cpbench.cli import flags
from cpbench.cli.case_flags import HOW_TO_RUN, WHICH_CASES, JsonFlag, PluginFlag

if TYPE_CHECKING:
    from cpbench.selection import Selection

EXAMPLES = """
[bold]Examples[/bold]

cpbench verify

cpbench verify --method upipe --world 8 --heads 16 --kv-heads 2

cpbench verify --method mine --plugin mine.py --full

The first checks every method at 4 ranks, the second one method at one shape, the third your own method at everything.
"""
_PIPE_WIDTH = 120
_PANEL_SHAPE = "One shape instead of the standard ones"
_PANEL_MATRIX = "Which shapes"


def verify(
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="M,...",
            help="Methods, see `cpbench list methods`, or `all`, the default.",
            rich_help_panel=WHICH_CASES,
        ),
    ] = None,
    world: Annotated[
        int, typer.Option("--world", metavar="N", help="Ranks, real processes.", rich_help_panel=WHICH_CASES)
    ] = 4,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="float32|bfloat16",
            help="Compute dtypes; a list with commas is allowed. float32 must agree to 1e-5; "
            "bfloat16 may have 1.5 times the error of `ulysses` (of `single` where that cannot run).",
            rich_help_panel=WHICH_CASES,
        ),
    ] = "float32",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="One shape, declared option sets included, two stacks.",
            rich_help_panel=_PANEL_MATRIX,
        ),
    ] = False,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Every option set at every standard shape, in both dtypes, and 4 random shapes.",
            rich_help_panel=_PANEL_MATRIX,
        ),
    ] = False,
    drawn: Annotated[
        int | None,
        typer.Option(
            "--random",
            metavar="N",
            help="So many more shapes, drawn from --seed.",
            rich_help_panel=_PANEL_MATRIX,
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option("--heads", metavar="N", help="Query heads; default 8.", rich_help_panel=_PANEL_SHAPE),
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(
            "--kv-heads",
            metavar="N",
            help="KV heads; must divide --heads; default 4.",
            rich_help_panel=_PANEL_SHAPE,
        ),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(
            "--head-dim", metavar="N", help="Width of a head, even; default 32.", rich_help_panel=_PANEL_SHAPE
        ),
    ] = None,
    hidden: Annotated[
        int | None,
        typer.Option(
            "--hidden",
            metavar="N",
            help="Width of the residual stream; default 104.",
            rich_help_panel=_PANEL_SHAPE,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            metavar="N",
            help="Blocks of the whole model; default 2.",
            rich_help_panel=_PANEL_SHAPE,
        ),
    ] = None,
    seqlen: Annotated[
        str | None,
        typer.Option(
            "--seqlen",
            metavar="S",
            help="Sequence length, like 1K; default 18 tokens a rank.",
            rich_help_panel=_PANEL_SHAPE,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", metavar="N", help="Sequences; default 1.", rich_help_panel=_PANEL_SHAPE),
    ] = None,
    qk_norm: Annotated[
        bool,
        typer.Option("--qk-norm", help="Norm queries and keys, as Qwen3 does.", rich_help_panel=_PANEL_SHAPE),
    ] = False,
    attention_bias: Annotated[
        bool,
        typer.Option(
            "--attention-bias",
            help="Biases on the projections to q, k and v, as in Qwen2.",
            rich_help_panel=_PANEL_SHAPE,
        ),
    ] = False,
    block_only: Annotated[
        bool,
        typer.Option(
            "--block-only",
            help="Check the attention block only: no whole models are trained, no peaks are counted. The quick way on "
            "one GPU that all ranks share.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="cpu|cuda",
            help="Where the ranks run; on cuda, all share one GPU where there are fewer than ranks.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = "cpu",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="METHOD.FIELD=VALUE",
            help="Option of a method; several values with commas check each. Default: the sets that it declares.",
            rich_help_panel=WHICH_CASES,
        ),
    ] = None,
    plugin: PluginFlag = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            help="Seed of inputs, weights and random shapes.",
            rich_help_panel=HOW_TO_RUN,
        ),
    ] = 0,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", metavar="SECONDS", help="Seconds for one launch.", rich_help_panel=HOW_TO_RUN
        ),
    ] = 3600.0,
    as_json: JsonFlag = False,
) -> None:
    """Compare methods with references in real processes.

    Output and every gradient of the attention block against textbook attention, also recomputed and with its output
    kept in host memory; causality, forward and backward; heads in another order; bytes sent, and peaks at a long
    length, against the method's closed forms; loss and gradient norm of the whole model over three optimizer steps in
    several stacks against `single`. The standard shapes have MHA, GQA, fewer KV heads than ranks, head counts that are
    no power of two or do not divide, one and two sequences, biases. Exit code 1 if anything fails.
    """
    from rich.console import Console

    from cpbench.cli.verify_display import make_display
    from cpbench.cli.verify_table import print_report
    from cpbench.errors import UsageError
    from cpbench.interrupt import Interrupt
    from cpbench.units import parse_length
    from cpbench.verify import VerifyRequest
    from cpbench.verify import verify as run

    plugins = tuple(plugin or ())
    names = flags.methods(method, plugins) or flags.methods(["all"], plugins)
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "hidden_dim": hidden}
    shape |= {"num_layers": layers, "batch_size": batch}
    flag_names = ("--heads", "--kv-heads", "--head-dim", "--hidden", "--layers", "--batch")
    for flag, value in (
        *zip(flag_names, shape.values(), strict=True),
        ("--world", world),
        ("--random", drawn),
    ):
        flags.counts(flag, [] if value is None else [str(value)])
    given: dict[str, object] = {name: value for name, value in shape.items() if value is not None}
    given |= {} if seqlen is None else {"seq_len": parse_length(seqlen)}
    given |= {"qk_norm": True} if qk_norm else {}
    given |= {"attention_bias": True} if attention_bias else {}
    if sum((quick, full, bool(given))) > 1:
        raise UsageError("--quick, --full and flags of one shape exclude one another; give one of them")
    dtypes: list[Dtype] = [
        "float32" if flags.choice("--dtype", item, get_args(Dtype)) == "float32" else "bfloat16"
        for item in flags.split("--dtype", [dtype])
    ]
    request = VerifyRequest(
        methods=tuple(dict.fromkeys(names)),
        options={
            name: [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
            for name, fields in flags.option_sets(option).items()
        },
        device=flags.choice("--device", device, get_args(Device)),  # type: ignore[arg-type]  # checked just here
        seed=seed,
        plugins=plugins,
        timeout_seconds=timeout,
        selection=_selection(world, dtypes, given, quick=quick, full=full, drawn=drawn, seed=seed),
    )
    if block_only:
        request = replace(request, selection=replace(request.selection, counted=frozenset(), stacks={}))
    console = Console()
    with Interrupt() as interrupt, make_display(Console(stderr=True)) as display:
        report = run(request, display=display, should_stop=lambda: interrupt.came)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        print_report(report, console if console.is_terminal else Console(width=_PIPE_WIDTH))
    if not report.passed:
        raise typer.Exit(1)


def _selection(
    world: int,
    dtypes: list[Dtype],
    given: dict[str, object],
    *,
    quick: bool,
    full: bool,
    drawn: int | None,
    seed: int,
) -> Selection:
    from cpbench import selection
    from cpbench.shape import Shape, random_shapes

    if given:
        common = {"world_size": world, "seq_len": 18 * world, "hidden_dim": 104} | given
        shapes = [Shape.model_validate({**common, "dtype": dtype}) for dtype in dtypes]
        return selection.one_shape([*shapes, *random_shapes(world, drawn or 0, seed, dtypes)])
    if quick:
        return selection.quick(world, dtypes)
    if full:
        every: tuple[Dtype, ...] = get_args(Dtype)
        return selection.full(
            world, every, random=selection.RANDOM_SHAPES if drawn is None else drawn, seed=seed
        )
    return selection.standard(world, dtypes, random=drawn or 0, seed=seed)
