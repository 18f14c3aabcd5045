"""`cpbench doctor`: what this machine can run, and why not the rest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpbench.doctor import Finding, examine

_STYLE = {"yes": "green", "no": "red", "warn": "yellow"}


def doctor(
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of the runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Say what this machine can run, and why not the rest."""
    diagnosis = examine(runs)
    if as_json:
        body = {
            "machine": diagnosis.machine.model_dump(mode="json"),
            "can_run": [dataclasses.asdict(finding) for finding in diagnosis.can_run],
            "parts": [dataclasses.asdict(finding) for finding in diagnosis.parts],
        }
        typer.echo(json.dumps(body, indent=1))
        return
    console = Console()
    console.print(Text(f"This machine ({diagnosis.machine.name}) can run:", style="bold"))
    console.print(_table(diagnosis.can_run))
    console.print(Text("\nIts parts:", style="bold"))
    console.print(_table(diagnosis.parts))


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        value = finding.value + (f" -> {finding.advice}" if finding.advice else "")
        table.add_row(Text(finding.state, style=_STYLE[finding.state]), Text(finding.name), Text(value))
    return table
