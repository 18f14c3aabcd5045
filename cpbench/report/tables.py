"""Points to rows of text: the results table, failures, warnings, findings, environment, and summary.md.

Pure functions: a cell is its text and the number it sorts by; escaping is the business of whoever shows it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cpbench.record import Record
from cpbench.report.checks import mixed_sources
from cpbench.report.load import Loaded, RunFacts
from cpbench.report.palette import MODE_WORD, StatusWords
from cpbench.report.series import Overview, Panel, Point, Series, stack_words
from cpbench.units import format_bytes, format_length, format_rate, format_seconds

MISSING = "-"


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of a table."""

    text: str
    sort: float | str | None
    """What the column is sorted by; None (missing) comes last in either direction."""
    kind: str = ""
    """A class for its looks: `good`, `bad` or empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of the results table."""

    title: str
    about: str
    """What it means, with the unit."""
    cell: Callable[[Point, Series], Cell]
    numeric: bool = True
    always: bool = False
    """Shown also where it says the same in every row."""


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
    for column in _COLUMNS:
        values = [column.cell(point, series) for point, series in pairs]
        if column.numeric and not column.always and all(cell.sort is None for cell in values):
            left_out.append(column.title.lower())
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
                        status=outcome.short,
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


def case_title(points: Sequence[Point], series: Series, panel: Panel) -> str:
    """Return the name of cases in a sentence, for example `ring (4 ranks), 128K, 256K`."""
    lengths = ", ".join(format_length(point.record.seq_len) for point in points)
    where = f" [{panel.title}]" if panel.title else ""
    return f"{series.label}, {lengths}{where}"


def loss_note(overview: Overview) -> str:
    """Say how many losses were held against `single`, and how many differ."""
    compared = [point for point in overview.points if point.loss.relative is not None]
    if not compared:
        return "No loss could be compared: no finished case of single has the same model, length, dtype and seed."
    differing = sum(point.loss.differs for point in compared)
    verdict = f"{differing} differ and are flagged and not plotted" if differing else "all agree"
    return (
        f"{len(compared)} losses were compared with single at the same model, length, dtype, seed and batch size "
        f"(relative tolerance 1e-4 in float32, 2e-2 in bfloat16): {verdict}."
    )


def summary_markdown(overview: Overview, loaded: Loaded) -> str:
    """Return the results and failures as Markdown, for a pull request or a CI summary."""
    table = results_table(overview)
    lines = ["# cpbench report", "", _markdown(overview.subtitle), "", _markdown(loss_note(overview)), ""]
    lines.append("| " + " | ".join(_markdown(column.title) for column in table.columns) + " |")
    lines.append("|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|")
    lines += ["| " + " | ".join(_markdown(cell.text) for cell in row) + " |" for row in table.rows]
    sections = (
        (
            "Without a result",
            [f"{f.case}: **{_markdown(f.status)}**: {_markdown(f.reason)}" for f in failures(overview)],
        ),
        ("Warnings", [_markdown(text) for text in warnings(overview, loaded)]),
        ("Skipped files", [_markdown(text) for text in loaded.skipped]),
    )
    for title, items in sections:
        if items:
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    return "\n".join(lines) + "\n"


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


def _number(name: str, show: Callable[[float | None], str]) -> Callable[[Point, Series], Cell]:
    def cell(point: Point, _: Series) -> Cell:
        value: float | None = getattr(point.record, name)
        return Cell(show(value), value)

    return cell


def _text(value: Callable[[Record], str]) -> Callable[[Point, Series], Cell]:
    return lambda point, _: Cell(value(point.record) or MISSING, value(point.record) or None)


def _status(point: Point, _: Series) -> Cell:
    return Cell(point.outcome.short, point.outcome.short, "good" if point.plotted else "bad")


def _loss_difference(point: Point, _: Series) -> Cell:
    relative = point.loss.relative
    return Cell(
        MISSING if relative is None else f"{relative:.1e}", relative, "bad" if point.loss.differs else ""
    )


def _float(value: float | None, digits: str = ".4g") -> str:
    return MISSING if value is None else format(value, digits)


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"


_COLUMNS: tuple[Column, ...] = (
    Column(
        title="Method",
        about="Context-parallel method",
        cell=_text(lambda r: r.method),
        numeric=False,
        always=True,
    ),
    Column(
        title="Options",
        about="Options of the method",
        cell=_text(lambda r: ", ".join(f"{k}={json.dumps(v)}" for k, v in sorted(r.options.items()))),
        numeric=False,
    ),
    Column(title="Model", about="Model preset", cell=_text(lambda r: r.model), numeric=False),
    Column(
        title="Length",
        about="Global sequence length in tokens",
        cell=lambda p, _: Cell(format_length(p.record.seq_len), p.record.seq_len),
        always=True,
    ),
    Column(
        title="Ranks",
        about="Processes that share the sequence and the parameters",
        cell=lambda p, _: Cell(str(p.record.world_size), p.record.world_size),
    ),
    Column(title="Batch", about="Sequences per step", cell=_text(lambda r: str(r.batch_size)), numeric=False),
    Column(title="Dtype", about="Compute dtype", cell=_text(lambda r: r.dtype), numeric=False),
    Column(
        title="Stack",
        about="Checkpointing, offload, tiling",
        cell=_text(lambda r: stack_words(r.stack)),
        numeric=False,
    ),
    Column(
        title="Mode",
        about="How the numbers came to be",
        cell=lambda _, s: Cell(MODE_WORD[s.identity.mode], s.identity.mode),
        numeric=False,
        always=True,
    ),
    Column(
        title="Where",
        about="Machine, or machine profile of an estimate",
        cell=lambda _, s: Cell(s.identity.place, s.identity.place),
        numeric=False,
    ),
    Column(title="Status", about="Outcome of the case", cell=_status, numeric=False, always=True),
    Column(
        title="Peak allocated",
        about="Peak bytes in live device tensors, largest over ranks",
        cell=_number("peak_allocated_bytes", format_bytes),
        always=True,
    ),
    Column(
        title="Peak reserved",
        about="Peak bytes held by the caching allocator, largest over ranks",
        cell=_number("peak_reserved_bytes", format_bytes),
    ),
    Column(
        title="Outside torch",
        about="Device bytes outside torch (NVML - reserved)",
        cell=_number("non_torch_bytes", format_bytes),
    ),
    Column(
        title="Attention",
        about="Peak of attention intermediates, largest over ranks",
        cell=_number("attention_intermediate_peak_bytes", format_bytes),
    ),
    Column(
        title="Host RSS",
        about="Peak resident set of the process",
        cell=_number("host_rss_peak_bytes", format_bytes),
    ),
    Column(
        title="Host pinned",
        about="Peak of the pinned host pool",
        cell=_number("host_pinned_peak_bytes", format_bytes),
    ),
    Column(
        title="Step",
        about="Median over timed steps of the slowest rank",
        cell=_number("step_seconds", format_seconds),
        always=True,
    ),
    Column(title="Forward", about="Forward pass, median", cell=_number("forward_seconds", format_seconds)),
    Column(title="Backward", about="Backward pass, median", cell=_number("backward_seconds", format_seconds)),
    Column(
        title="Optimizer", about="Clip and update, median", cell=_number("optimizer_seconds", format_seconds)
    ),
    Column(
        title="Tokens/s", about="Tokens per second, all ranks", cell=_number("tokens_per_second", format_rate)
    ),
    Column(
        title="Tokens/s/rank",
        about="Tokens per second and rank",
        cell=_number("tokens_per_second_per_gpu", format_rate),
        always=True,
    ),
    Column(
        title="TFLOP/s/rank",
        about="Model FLOPs, 1e12 per second and rank",
        cell=_number("tflops_per_gpu", _float),
    ),
    Column(title="MFU", about="Model FLOPs over the device's dense peak", cell=_number("mfu", _percent)),
    Column(
        title="Loss", about="Mean loss after the last step", cell=_number("loss", lambda v: _float(v, ".5f"))
    ),
    Column(title="Loss vs single", about="Relative difference to single", cell=_loss_difference),
    Column(
        title="Kernel",
        about="Attention kernel that ran",
        cell=_text(lambda r: r.attention_backend or ""),
        numeric=False,
    ),
    Column(title="Run", about="Run folder", cell=lambda p, _: Cell(p.entry.run, p.entry.run), numeric=False),
)
