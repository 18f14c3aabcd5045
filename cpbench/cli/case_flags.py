"""The flags that several commands declare alike: which cases, on which machine, and where results go.

Each is an annotation with its name, metavar and help, to be used as `method: MethodFlag = None`. typer evaluates the
annotations of a command when the program starts, so import these at run time. A command declares a flag itself where
it means something else there, or has another default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WHICH_CASES, HOW_TO_RUN, WHERE_IT_GOES = "Which cases", "How to run it", "Where it goes"
"""Panels of `--help`."""

MethodFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="M,...",
        help="Methods, see `cpbench list methods`, or `all`. Default: upipe.",
        rich_help_panel=WHICH_CASES,
    ),
]
ModelFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="M,...",
        help="Presets, see `cpbench list models`, or paths of Hugging Face config.json files. "
        "Default: llama3-8b.",
        rich_help_panel=WHICH_CASES,
    ),
]
SeqlenFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--seqlen",
        metavar="S,...",
        help="Sequence lengths in tokens: 4096, 128K, 5M (K = 1024). Default: 128K.",
        rich_help_panel=WHICH_CASES,
    ),
]
WorldFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--world",
        metavar="N,...",
        help="Numbers of ranks (GPUs, or processes on a CPU). Default: 8.",
        rich_help_panel=WHICH_CASES,
    ),
]
BatchFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--batch", metavar="N,...", help="Sequences per step. Default: 1.", rich_help_panel=WHICH_CASES
    ),
]
DtypeFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--dtype",
        metavar="float32|bfloat16",
        help="Compute dtypes; a list with commas is allowed. Default: bfloat16.",
        rich_help_panel=WHICH_CASES,
    ),
]
StackFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--stack",
        metavar="plain|checkpoint|long",
        help="What surrounds attention: nothing special; full checkpointing; checkpointing with inputs "
        "offloaded and everything tiled. A list with commas is allowed. Default: long.",
        rich_help_panel=WHICH_CASES,
    ),
]
StackOptionFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--stack-option",
        metavar="FIELD=VALUE",
        help="Change of the stack: checkpoint, offload, tile_mlp, tile_norm, tile_loss, optimizer_offload, "
        "save_attention or host_budget_bytes; repeatable.",
        rich_help_panel=WHICH_CASES,
    ),
]
OptionFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="METHOD.FIELD=VALUE",
        help="Option of a method; several values with commas are one more axis; repeatable.",
        rich_help_panel=WHICH_CASES,
    ),
]
PluginFlag = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        help="Python file of a method outside the tree; repeatable.",
        rich_help_panel=WHICH_CASES,
    ),
]
HardwareFlag = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        metavar="H",
        help="Machine profile of estimates, and of the communication of emulated cases; see "
        "`cpbench list hardware`. Default: h100-80g.",
        rich_help_panel=WHICH_CASES,
    ),
]
HostRamFlag = Annotated[
    str | None,
    typer.Option(
        "--host-ram",
        metavar="SIZE",
        help="Host memory of a node that estimates are for, like 2T or 512G. Default: the profile's.",
        rich_help_panel=WHICH_CASES,
    ),
]
RunsFlag = Annotated[
    Path, typer.Option("--runs", metavar="DIR", help="Folder of the runs.", rich_help_panel=WHERE_IT_GOES)
]
JsonFlag = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print JSON on standard output; progress goes to standard error.",
        rich_help_panel=WHERE_IT_GOES,
    ),
]
JsonNoFilesFlag = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print JSON on standard output and write no files; progress goes to standard error.",
        rich_help_panel=WHERE_IT_GOES,
    ),
]
"""`--json` of the commands that otherwise write files of their own under --out."""
