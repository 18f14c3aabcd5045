"""What `cpbench sweep` prints: a plan that is not run, the result as JSON, and what to do next."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from cpbench.cli.request import SweepRequest
from cpbench.expand import Plan
from cpbench.progress import headline
from cpbench.summary import print_cases
from cpbench.sweep import INCOMPLETE_EXIT, SweepResult


def print_plan(plan: Plan, *, as_json: bool) -> None:
    """Print the cases of a plan on standard output, and why some are unsupported; as a table or as JSON."""
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
        return
    console = Console()
    console.print(Text(headline(plan)), soft_wrap=not console.is_terminal)
    print_cases([*plan.cases], console)


def print_result_as_json(plan: Plan, result: SweepResult) -> None:
    """Print what came of a plan on standard output, as JSON; records without what is of single ranks."""
    body = {
        "run": str(result.folder),
        "mode": plan.choice.mode,
        "device": plan.choice.device,
        "exit_code": result.exit_code,
        "counts": result.counts,
        "remaining": result.remaining,
        "records": [record.model_dump(mode="json", exclude={"ranks"}) for record in result.records],
    }
    typer.echo(json.dumps(body, indent=1))


def print_next(request: SweepRequest, result: SweepResult, console: Console) -> None:
    """Print where the records are and the command that comes next.

    Args:
        request: the flags, which the command to continue repeats in part.
        result: of the sweep.
        console: where to print.
    """
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
