"""The `cpbench` command: one module a command; the only place that prints a failure and exits.

Exit codes: 0 done (out of memory and unsupported cases are results), 1 regression, failed verification or a
defect of cpbench, 2 wrong usage, 3 incomplete (a case ended in error or timeout), 130 and 143 interrupted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import cpbench
from cpbench.cli import doctor, explain, listing, plan, report, sweep, verify
from cpbench.errors import CpbenchError

_INTERRUPTED = 130


class _Group(TyperGroup):
    """Turns a user's problem into one message and exit code 2; every other exception keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - the context class depends on typer's version
        try:
            return super().invoke(ctx)
        except CpbenchError as error:
            typer.echo(f"cpbench: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            typer.echo("cpbench: interrupted", err=True)
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    name="cpbench",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 regression or failed verification, 2 wrong usage, "
    "3 a case ended in error or timeout, 130/143 interrupted.",
)


def _command(name: str, function: Callable[..., None], examples: str | None = None) -> None:
    """Add a command; the paragraphs of its docstring flow, where typer would break them as the source does."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(name, help=text, epilog=examples)(function)


_command("sweep", sweep.sweep, sweep.EXAMPLES)
_command("report", report.report)
_command("plan", plan.plan, plan.EXAMPLES)
_command("verify", verify.verify, verify.EXAMPLES)
_command("explain", explain.explain_, explain.EXAMPLES)
_command("list", listing.list_)
_command("doctor", doctor.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cpbench {cpbench.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Memory, speed and correctness of context-parallel training methods on one equal stack."""


def main() -> None:
    """Entry point of the console script."""
    app()


__all__ = ["app", "main"]
