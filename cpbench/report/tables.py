"""Points to rows of text: the results table, failures, warnings, environment, and summary.md.

Pure functions; escaping is the business of whoever shows the text.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.report.checks import mixed_sources
from cpbench.report.columns import COLUMNS, Cell, Column
from cpbench.report.load import Loaded, RunFacts
from cpbench.report.palette import StatusWords
from cpbench.report.series import Overview, Panel, Point, Series
from cpbench.units import format_bytes, format_length

if TYPE_CHECKING:
    from cpbench.report.baseline import Comparison, Heading
    from cpbench.report.published import BesidePublished


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of cells under columns."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left_out: tuple[str, ...]
    """Titles of the columns without any value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Cases of one series without a plotted number, and why: the same outcome for the same reason."""

    case: str
    status: str
    kind: str
    """What the status means."""
    reason: str
    """First line of the reason."""
    details: str
    """The other lines, usually the end of the log."""


def results_table(overview: Overview) -> Table:
    """Return one row a case; columns that say nothing here are left out.

    A describing column is left out when it is equal in every row (the subtitle says it), a measured one when
    no case has a value.
    """
    pairs = [
        (point, series) for panel in overview.panels for series in panel.series for point in series.points
    ]
    columns: list[Column] = []
    cells: list[list[Cell]] = []
    left_out: list[str] = []
    for column in COLUMNS:
        values = [column.cell(point, series) for point, series in pairs]
        if column.numeric and not column.always and all(cell.sort is None for cell in values):
            left_out.append(column.title)
        elif column.numeric or column.always or len({cell.text for cell in values}) > 1:
            columns.append(column)
            cells.append(values)
    return Table(columns=tuple(columns), rows=tuple(zip(*cells, strict=True)), left_out=tuple(left_out))


def failures(overview: Overview) -> tuple[Failure, ...]:
    """Return every case whose numbers are in no picture, with the reason in words."""
    found = []
    for panel in overview.panels:
        for series in panel.series:
            alike: dict[tuple[StatusWords, str], list[Point]] = {}
            for point in series.missing:
                alike.setdefault((point.outcome, _reason(point).strip()), []).append(point)
            for (outcome, reason), points in alike.items():
                first, _, rest = reason.partition("\n")
                found.append(
                    Failure(
                        case=case_title(points, series, panel),
                        status=outcome.name,
                        kind=outcome.long,
                        reason=first,
                        details=rest.strip("\n"),
                    )
                )
    return tuple(found)


def warnings(overview: Overview, loaded: Loaded) -> tuple[str, ...]:
    """Return every doubt about what is shown."""
    found = []
    for panel in overview.panels:
        for series in panel.series:
            for point in series.points:
                found += [f"{case_title([point], series, panel)}: {text}" for text in point.record.warnings]
    found += mixed_sources(loaded.entries)
    commits = {entry.record.git_commit for entry in loaded.entries if entry.record.git_commit}
    if len(commits) > 1:
        found.append(f"the cases were run at {len(commits)} commits: {', '.join(sorted(commits))}")
    for run in loaded.runs:
        if run.planned is not None and run.planned > run.records:
            found.append(
                f"run {run.name} is not complete: {run.records} of {run.planned} cases have a readable record"
            )
    if overview.replaced:
        found.append(f"{overview.replaced} older copies of a case are not shown; the one started last is")
    return tuple(dict.fromkeys(found))


def notes(overview: Overview) -> tuple[str, ...]:
    """Return what records say that their numbers leave out; one text for the cases that say the same."""
    found: dict[str, list[str]] = {}
    for panel in overview.panels:
        for series in panel.series:
            said: dict[str, list[Point]] = {}
            for point in series.points:
                for text in point.record.notes:
                    said.setdefault(text, []).append(point)
            for text, points in said.items():
                found.setdefault(text, []).append(case_title(points, series, panel))
    return tuple(f"{'; '.join(cases)}: {text}" for text, cases in found.items())


def case_title(points: Sequence[Point], series: Series, panel: Panel) -> str:
    """Return the name of cases in a sentence, for example `ring (4 ranks), 128K, 256K`."""
    lengths = ", ".join(format_length(point.record.seq_len) for point in points)
    where = f" [{panel.title}]" if panel.title else ""
    return f"{series.label}, {lengths}{where}"


def loss_note(overview: Overview) -> str:
    """Say how many losses were held against `single`, and how many differ."""
    compared = [point for point in overview.points if point.loss.relative is not None]
    if not compared:
        return "No loss could be compared: no finished case of single has the same model, length and seed."
    differing = sum(point.loss.differs for point in compared)
    verdict = f"{differing} differ and are flagged and not plotted" if differing else "all agree"
    return (
        f"{len(compared)} losses were compared with single at the same model, length, dtype, seed and batch "
        f"(relative tolerance 1e-4 in float32, 2e-2 in bfloat16): {verdict}."
    )


def summary_markdown(
    overview: Overview,
    loaded: Loaded,
    comparison: Comparison | None = None,
    published: BesidePublished | None = None,
) -> str:
    """Return the results, the comparisons and the failures as Markdown, for a pull request or a CI summary."""
    table = results_table(overview)
    lines = ["# cpbench report", "", _markdown(overview.subtitle), "", _markdown(loss_note(overview)), ""]
    lines += _markdown_table(table.columns, table.rows)
    if comparison is not None:
        lines += _markdown_comparison(comparison)
    if published is not None:
        lines += _markdown_published(published)
    sections = (
        (
            "Without a result",
            [
                f"{_markdown(f.case)}: **{_markdown(f.status)}**: {_markdown(f.reason)}"
                for f in failures(overview)
            ],
        ),
        ("Notes", [_markdown(text) for text in notes(overview)]),
        ("Warnings", [_markdown(text) for text in warnings(overview, loaded)]),
        ("Skipped files", [_markdown(text) for text in loaded.skipped]),
    )
    for title, items in sections:
        if items:
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    return "\n".join(lines) + "\n"


def _markdown_table(
    columns: Sequence[Column] | Sequence[Heading], rows: Sequence[Sequence[Cell]]
) -> list[str]:
    return [
        "| " + " | ".join(_markdown(column.title) for column in columns) + " |",
        "|" + "|".join("---:" if column.numeric else "---" for column in columns) + "|",
        *("| " + " | ".join(_markdown(cell.text) for cell in row) + " |" for row in rows),
    ]


def _markdown_comparison(comparison: Comparison) -> list[str]:
    lines = ["", f"## Against the baseline {_markdown(comparison.name)}", ""]
    lines.append(" ".join(_markdown(text) for text in comparison.lead))
    lists = (
        ("No longer ok", comparison.flagged),
        ("Only in this report", comparison.only_here),
        ("Only in the baseline", comparison.only_there),
    )
    for title, texts in lists:
        if texts:
            lines += ["", f"{title}:", "", *(f"- {_markdown(text)}" for text in texts)]
    if comparison.rows:
        lines += ["", *_markdown_table(comparison.columns, comparison.rows)]
    return lines


def _markdown_published(published: BesidePublished) -> list[str]:
    lines = ["", "## Beside the published results", "", " ".join(_markdown(text) for text in published.lead)]
    lines += ["", *_markdown_table(published.columns, published.rows), "", "Sources:", ""]
    return lines + [f"- {_markdown(f'{text} {url}'.strip())}" for text, url in published.sources]


def environment(overview: Overview, loaded: Loaded) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Return, for each run, its facts as pairs of name and text."""
    return tuple((run.name, _run_facts(run, overview)) for run in loaded.runs)


def _run_facts(run: RunFacts, overview: Overview) -> tuple[tuple[str, str], ...]:
    records = [point.record for point in overview.points if point.entry.run == run.name]
    machines = {record.machine for record in records if record.machine}
    facts: list[tuple[str, str]] = [("Command", run.command or ""), ("Scenario", run.scenario or "")]
    facts += [
        ("Started", run.started or min((r.started for r in records), default="")),
        ("Ended", run.ended or ""),
    ]
    facts.append(("Records", str(run.records) + (f" of {run.planned} planned" if run.planned else "")))
    for machine in sorted(machines, key=lambda m: m.name):
        memory = format_bytes(machine.host_memory_bytes)
        gpus = [f"{gpu.name} ({format_bytes(gpu.memory_bytes)})" for gpu in machine.gpus]
        facts.append(("Machine", machine.name))
        facts.append(("Processor", f"{machine.cpu}, {machine.cpu_count} logical processors, {memory} memory"))
        facts.append(("GPUs", ", ".join(gpus) or "none"))
        facts.append(("System", f"{machine.os}, Python {machine.python}"))
        facts.append(("GPU driver", machine.driver or ""))
    for title, values in (
        ("torch", {r.torch for r in records}),
        ("CUDA", {r.cuda for r in records}),
        ("NCCL", {r.nccl for r in records}),
        ("Attention kernel", {r.attention_backend for r in records}),
        ("cpbench", {r.cpbench_version for r in records}),
        ("Commit", {r.git_commit for r in records} | {run.git_commit}),
    ):
        facts.append((title, ", ".join(sorted(value for value in values if value))))
    shown = {title.lower() for title, text in facts if text}
    facts += [(name, text) for name, text in run.versions if name.lower() not in shown]
    return tuple((title, text) for title, text in facts if text)


def _reason(point: Point) -> str:
    if point.record.status == "ok":
        return (
            f"loss {point.record.loss:.6g} differs from the one of single by {point.loss.relative:.2g} "
            f"(relative; allowed: {point.loss.tolerance:g})"
        )
    return point.record.reason or "no reason was recorded"


def _markdown(text: str) -> str:
    """Make text from a record harmless in a Markdown table: no markup, no line break, no link."""
    safe = html.escape(" ".join(text.split()), quote=False)
    for character in "\\`*_[]|~":
        safe = safe.replace(character, "\\" + character)
    return safe.replace("://", ":\u200b//")
