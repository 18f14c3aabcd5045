"""The tables of `cpbench verify`: worst errors of each method and where, bytes sent and peaks, and what was wrong."""

from __future__ import annotations

import string
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpbench.errors import without_name
from cpbench.shape import Shape
from cpbench.units import format_bytes, format_length
from cpbench.verification import Check, Kind, MethodFindings, Verification, VerifyReport, title

_COLUMNS: tuple[tuple[str, tuple[Kind, ...]], ...] = (
    ("out", ("out",)),
    ("gradients", ("gradients",)),
    ("causality", ("causality",)),
    ("permuted", ("permutation",)),
    ("loss", ("loss",)),
    ("grad norm", ("grad norm",)),
)
_STYLES = {"pass": None, "fail": "bold red", "error": "bold red", "unsupported": "dim"}


def print_report(report: VerifyReport, console: Console) -> None:
    """Print everything a reader needs; `--json` has every number."""
    shapes = _letters(report)
    world = max(result.shape.world_size for result in report.results)
    ranks = f"{world} rank" + "s" * (world > 1)
    where = "one GPU, exchanging through host memory" if report.shared_gpu else report.device
    console.print(f"Largest relative errors against the references, {ranks} on {where}", highlight=False)
    for shape, letter in shapes.items():
        console.print(f"  {letter}  {shape.title}", highlight=False, markup=False)
    console.print(_errors(report, shapes))
    if any(result.peaks for result in report.results):
        console.print(
            "One attention block of a rank: bytes sent, and peaks at a long length", highlight=False
        )
        console.print(_memory(report, shapes))
        console.print(
            "At: heads of a shape, tokens of a rank x head_dim. M: all query heads of these tokens. *: none stated.",
            style="dim",
        )
    for findings in report.methods:
        if findings.reason:
            reason = without_name(findings.reason, findings.method)
            text = f"{title(findings.method, findings.given)}: {findings.verdict}: {reason}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def _errors(report: VerifyReport, shapes: dict[Shape, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="fold", min_width=12)
    table.add_column("verdict", no_wrap=True)
    table.add_column("shapes", no_wrap=True)
    for name, _ in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for findings, results in _grouped(report):
        count = f"{findings.passed} of {findings.supported}" if findings.supported else "none"
        cells = [_worst(results, kinds, shapes) for _, kinds in _COLUMNS]
        name = title(findings.method, findings.given)
        table.add_row(Text(name), findings.verdict, count, *cells, style=_STYLES[findings.verdict])
    baselines = [result for result in report.results if any(c.baseline is not None for c in result.checks)]
    if baselines:
        table.add_section()
        cells = [_worst(baselines, kinds, shapes, baseline=True) for _, kinds in _COLUMNS]
        table.add_row("baseline: ulysses (or single)", "", "", *cells, style="dim")
    return table


def _memory(report: VerifyReport, shapes: dict[Shape, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("method", "sent forward", "backward", "peak forward", "backward", "at"):
        table.add_column(
            name, justify="left" if name in ("method", "at") else "right", no_wrap=name != "method"
        )
    for findings, results in _grouped(report):
        known = [result for result in results if result.peaks is not None]
        if not known:
            continue
        result, peaks = known[0], known[0].peaks
        if peaks is None:
            continue
        table.add_row(
            Text(title(findings.method, findings.given)),
            format_bytes(sum(result.forward_sent.values())),
            format_bytes(sum(result.backward_sent.values())),
            _peak(peaks.forward_bytes, peaks.unit_bytes, peaks.stated_forward_bytes),
            _peak(peaks.backward_bytes, peaks.unit_bytes, peaks.stated_backward_bytes),
            f"{_letter(result.shape, shapes)}, {format_length(peaks.tokens_per_rank)} x {peaks.head_dim}",
        )
    return table


def _peak(counted: int, unit: int, stated: int) -> str:
    return f"{format_bytes(counted)} = {counted / unit:.2f} M{'' if stated else ' *'}"


def _worst(
    results: Sequence[Verification],
    kinds: tuple[Kind, ...],
    shapes: dict[Shape, str],
    *,
    baseline: bool = False,
) -> str:
    """The check that uses most of its limit among the results, and the letter of its shape."""
    found = [
        (_severity(check), check, result.shape)
        for result in results
        for check in result.checks
        if check.kind in kinds and (check.baseline is not None or not baseline)
    ]
    if not found:
        return "-"
    _, check, shape = max(found, key=lambda item: item[0])
    error = check.baseline if baseline else check.error
    words = "not finite" if error is None else f"{error:.1e}" if error else "0"
    return f"{words} {_letter(shape, shapes)}"


def _severity(check: Check) -> tuple[bool, float]:
    if check.error is None:
        return True, float("inf")
    return not check.passed, check.error / check.limit if check.limit else check.error


def _grouped(report: VerifyReport) -> list[tuple[MethodFindings, list[Verification]]]:
    return [
        (
            findings,
            [r for r in report.results if (r.method, r.options) == (findings.method, findings.options)],
        )
        for findings in report.methods
    ]


def _letters(report: VerifyReport) -> dict[Shape, str]:
    """A letter for each shape; `single` has it of the same shape on more ranks."""
    widest = max(result.shape.world_size for result in report.results)
    known = dict.fromkeys(_widened(result.shape, widest) for result in report.results)
    return dict(zip(known, string.ascii_uppercase + string.ascii_lowercase, strict=False))


def _widened(shape: Shape, world_size: int) -> Shape:
    return shape.model_copy(update={"world_size": world_size})


def _letter(shape: Shape, shapes: dict[Shape, str]) -> str:
    world_size = next(iter(shapes)).world_size
    return shapes.get(_widened(shape, world_size), "?")
