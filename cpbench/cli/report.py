"""`cpbench report`: one offline page and pictures from the records of one or more runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cpbench.errors import UsageError


def report(
    run: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs: folders, or names in --runs.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of the page and pictures. Default: RUN/report."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="RUN|DIR", help="Hold the runs against this one, or a folder of records."
        ),
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of the runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Make one offline HTML page, PNG pictures, CSV and Markdown from records."""
    folders = [_folder(text, runs) for text in run]
    against = None if baseline is None else _folder(baseline, runs, what="baseline")
    from cpbench.report import build

    result = build(folders, out or folders[0] / "report", against)
    if as_json:
        body = {
            "page": str(result.page),
            "pictures": [str(path) for path in result.pictures],
            "tables": [str(path) for path in result.tables],
            "skipped": list(result.skipped),
        }
        typer.echo(json.dumps(body, indent=1))
        return
    console = Console()
    for problem in result.skipped:
        console.print(Text(f"skipped: {problem}"), soft_wrap=True)
    console.print(Text(f"page: {result.page}"), soft_wrap=True)
    for picture in result.pictures:
        console.print(Text(f"picture: {picture}"), soft_wrap=True)
    for table in result.tables:
        console.print(Text(f"table: {table}"), soft_wrap=True)


def _folder(text: str, runs: Path, *, what: str = "run") -> Path:
    """The folder of a run given as a path, or as a name in `runs`."""
    for folder in (Path(text), runs / text):
        if folder.is_dir():
            return folder
    known = sorted(path.parent.name for path in runs.glob("*/run.json")) if runs.is_dir() else []
    hint = f"; runs there: {', '.join(known[-5:])}" if known else ""
    raise UsageError(f"{what} {text!r} is neither a folder nor a run in {runs}{hint}")
