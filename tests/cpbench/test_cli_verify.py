"""What `cpbench verify` asks for, and what it shows while it works; nothing is launched."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cpbench.cli import app
from cpbench.cli.verify_display import make_display
from cpbench.selection import quick
from cpbench.shape import Shape
from cpbench.verification import Verdict, Verification, VerifyReport
from cpbench.verify import VerifyRequest

SHAPE = Shape(seq_len=8)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[VerifyRequest]:
    """Collects what would be verified; everything passes."""
    seen: list[VerifyRequest] = []

    def verify(request: VerifyRequest, **_: object) -> VerifyReport:
        seen.append(request)
        results = [Verification(method=name, shape=SHAPE, verdict="pass") for name in request.methods]
        return VerifyReport.of(request.device, results)

    monkeypatch.setattr("cpbench.verify.verify", verify)
    return seen


def invoke(*arguments: str) -> None:
    result = CliRunner().invoke(app, ["verify", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output


def test_block_only_trains_and_counts_nothing(requests: list[VerifyRequest]) -> None:
    """The same shapes and option sets with and without it, but no stacks and no peaks."""
    arguments = ("--method", "ring,upipe", "--quick", "--dtype", "bfloat16", "--device", "cuda")
    invoke(*arguments)
    invoke(*arguments, "--block-only")

    whole, block = requests
    assert whole.selection == quick(4, ["bfloat16"])
    assert any(item.stacks and item.count for item in whole.items())
    assert block == replace(whole, selection=replace(whole.selection, stacks={}, counted=frozenset()))
    assert block.device == "cuda"
    assert [(item.case, item.given) for item in block.items()] == [
        (item.case, item.given) for item in whole.items()
    ]
    assert not any(item.stacks or item.count for item in block.items())


def test_block_only_goes_with_any_choice_of_shapes(requests: list[VerifyRequest]) -> None:
    """Standard, full, or one shape: all of them, and nothing else of each."""
    for chosen in ((), ("--full",), ("--heads", "16", "--kv-heads", "2")):
        invoke("--method", "ring", *chosen)
        invoke("--method", "ring", *chosen, "--block-only")

    for whole, block in zip(requests[::2], requests[1::2], strict=True):
        assert block.selection.shapes == whole.selection.shapes
        assert any(item.stacks for item in whole.items())
        assert not any(item.stacks or item.count for item in block.items())


@pytest.mark.parametrize(("verdict", "shown"), [("fail", True), ("error", True), ("pass", False)])
@pytest.mark.parametrize("width", [40, 120])
def test_a_whole_reason_is_printed(verdict: Verdict, shown: bool, width: int) -> None:
    """A reason of many lines and words, brackets included, comes at once and complete; what passes says nothing."""
    reason = "ring: rank 1: [error] " + "a word " * 60 + "\n  then [/]more\n" + "x" * 300 + " and the end"
    console = Console(file=io.StringIO(), width=width)
    with make_display(console) as display:
        display.started(1, 0)
        display.finished(
            Verification(method="ring", given={"chunk": 8}, shape=SHAPE, verdict=verdict, reason=reason)
        )
        text = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above

    assert text.startswith("1 combinations of method, options and shape\n")
    expected = f"{verdict}: ring chunk=8 at {SHAPE.title}: {reason.removeprefix('ring: ')}\n"
    assert text.endswith(expected) == shown
    assert ("and the end" in text) == shown
