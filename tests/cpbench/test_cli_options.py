"""Every option of the command line has the name that is written in it, whatever typer would make up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cpbench.cli

FILES = sorted(Path(cpbench.cli.__file__).parent.glob("*.py"))


def options(source: str) -> Iterator[ast.Call]:
    """Yield every call of `typer.Option`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.Option", "Option"):
            yield node


def nameless(source: str) -> list[int]:
    """Return the lines of options without a name of their own.

    typer 0.27 names an option after its metavar where its declaration has none.
    """
    return [call.lineno for call in options(source) if not any(map(_is_name, call.args))]


def _is_name(argument: ast.expr) -> bool:
    return (
        isinstance(argument, ast.Constant)
        and isinstance(argument.value, str)
        and argument.value.startswith("--")
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_option_names_itself(file: Path) -> None:
    """A long name stands among the first arguments of each."""
    assert nameless(file.read_text(encoding="utf-8")) == []


def test_there_are_options_to_look_at() -> None:
    """They are found where they are: as many calls as the text has, and dozens of them."""
    texts = [file.read_text(encoding="utf-8") for file in FILES]
    found = sum(len(list(options(text))) for text in texts)
    assert found == sum(text.count("Option(") for text in texts)
    assert found > 50


@pytest.mark.parametrize(
    ("declared", "lines"),
    [
        ('typer.Option("--seed", metavar="N")', []),
        ('typer.Option("--method", "-m", metavar="M,...")', []),
        ('typer.Option("--lean/--no-lean", help="less")', []),
        ('typer.Option(metavar="N", help="Seed.")', [1]),
        ('typer.Option("-s", metavar="N")', [1]),
        ("typer.Option(None, help='--seed')", [1]),
        ("Option(NAME)", [1]),
        ("[\n  typer.Option('--a'),\n  typer.Option(),\n]", [3]),
    ],
)
def test_an_option_without_a_name_is_found(declared: str, lines: list[int]) -> None:
    """Also with a short name only, a default in its place, or a name that no reader of the source sees."""
    assert nameless(declared) == lines
