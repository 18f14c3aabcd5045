"""What `cpbench explain` prints: the peak, memory over the step, tables, and several cases side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from cpbench.explanation import Explanation, Moment
from cpbench.report.explanation_words import categories, difference, limit_words, where, why
from cpbench.summary import CaseNames
from cpbench.text_table import Row, TextColumn, TextTable
from cpbench.units import format_bytes

_ROWS = 6
"""Lines of the chart of memory over the step."""
_BLOCKS = " ▁▂▃▄▅▆▇█"
_PLAIN = "   #####"  # for a terminal that is not Unicode: a cell is full from a third on
_LEFT = 11
"""Columns left of the chart, for its scale."""
_WIDEST = 120
_MOST_NAMED = 4


def print_explanations(found: Sequence[Explanation], console: Console) -> None:
    """Print every case, then all side by side."""
    for explanation in found:
        _print_one(explanation, console)
    names = short_names(found)
    if len(found) == 2:
        _print_pair(found, names, console)
    elif len(found) > 2:
        _print_many(found, names, console)


def short_names(found: Sequence[Explanation]) -> list[str]:
    """Return what tells the cases apart and nothing else."""
    cases = [e.case for e in found]
    names = CaseNames(cases)
    told: list[list[str]] = [[] for _ in cases]
    for column in names.columns:
        cells = [names.cells(case, [column])[0] for case in cases]
        if len(set(cells)) > 1:
            for words, cell in zip(told, cells, strict=True):
                words.append({"world": f"x{cell}", "batch": f"batch={cell}"}.get(column, cell))
    for words, case in zip(told, cases, strict=True):
        words += [part for part in names.options(case).split(", ") if part]
    return [" ".join(words) or case.method for words, case in zip(told, cases, strict=True)]


def _print_one(e: Explanation, console: Console) -> None:
    a = e.anatomy
    title = f"\n{e.case.title}: estimated peak {format_bytes(a.peak_bytes)} in {where(a.peak)}"
    console.print(Text(title, style="bold"))
    words = f"host memory of the rank {format_bytes(a.host_bytes)}"
    if e.device_bytes is not None:
        words = (
            f"room for tensors on {e.case.hardware} {format_bytes(e.device_bytes)}, {words}; {limit_words(e)}"
        )
    console.print(Text(words))
    console.print("\ntensors on the device over the step, by allocations and frees")
    for line in chart(a.timeline, min(console.width, _WIDEST), unicode=console.encoding.startswith("utf")):
        console.print(Text(line, no_wrap=True, overflow="ellipsis"))
    console.print()
    columns = [
        TextColumn("category", right=False),
        TextColumn("at the peak", narrow="at the\npeak"),
        TextColumn("peak without it", narrow="peak\nwithout it"),
        TextColumn("which lies in", right=False, narrow="which\nlies in"),
    ]
    rows = [
        Row((c.name, format_bytes(c.bytes), format_bytes(c.peak_without_bytes), c.phase_without))
        for c in a.categories
    ]
    console.print(TextTable(columns, rows))
    console.print()
    console.print(_tensors(e))
    if e.options:
        console.print()
        console.print(_options(e))


def _tensors(e: Explanation) -> TextTable:
    rows = []
    for t in e.anatomy.tensors:
        tensor = " x ".join(str(size) for size in t.shape or ()) + (f" {t.dtype}" if t.dtype else "")
        when = t.made_in if t.made_in.startswith("before") else f"in {t.made_in}"
        note = Text(f"{tensor}, " if tensor else "").append(f"made by {t.site} {when}", style="dim")
        cells = (
            format_bytes(t.total_bytes),
            str(t.count),
            t.category,
            format_bytes(t.peak_without_bytes),
        )
        rows.append(Row(cells, note))
    rows.append(Row((format_bytes(e.anatomy.unlisted_bytes), "", "smaller ones", "")))
    columns = [
        TextColumn("bytes"),
        TextColumn("count"),
        TextColumn("category", right=False),
        TextColumn("peak without them", narrow="peak without\nthem"),
    ]
    return TextTable(columns, rows, note="tensor")


def _options(e: Explanation) -> TextTable:
    rows = []
    for o in e.options:
        change = "" if o.peak_bytes is None else difference(o.peak_bytes - e.anatomy.peak_bytes)
        cells = (f"{o.option}={o.value}", format_bytes(o.peak_bytes), change, format_bytes(o.host_bytes))
        rows.append(Row(cells, o.reason or ""))
    columns = [
        TextColumn("stack option", right=False),
        TextColumn("peak"),
        TextColumn("difference"),
        TextColumn("host"),
    ]
    return TextTable(columns, rows)


def _print_pair(found: Sequence[Explanation], names: Sequence[str], console: Console) -> None:
    console.print(Text("\nside by side, each at its own estimated peak", style="bold"))
    headings = [TextColumn(name, narrow=name.replace(" ", "\n")) for name in names]
    peaks = [e.anatomy.peak_bytes for e in found]
    rows = [_compared(name, sizes) for name, sizes in categories(found)]
    host = _compared("host memory", [e.anatomy.host_bytes for e in found])
    rows += [_compared("peak", peaks, style="bold"), host]
    columns = [TextColumn("category", right=False), *headings, TextColumn("difference")]
    console.print(TextTable(columns, rows))
    console.print(Text(f"\n{why(found, names)}", style="bold"))


def _compared(name: str, sizes: Sequence[int], *, style: str = "") -> Row:
    return Row((name, *(format_bytes(size) for size in sizes), difference(sizes[1] - sizes[0])), style=style)


def _print_many(found: Sequence[Explanation], names: Sequence[str], console: Console) -> None:
    console.print(Text("\nside by side, each at its own estimated peak", style="bold"))
    rows = []
    for name, e in sorted(zip(names, found, strict=True), key=lambda item: item[1].anatomy.peak_bytes):
        parts = [
            f"{c.name.replace('_', ' ')} {format_bytes(c.bytes)}" for c in e.anatomy.categories[:_MOST_NAMED]
        ]
        note = ", ".join(parts) + (f"; {limit_words(e)}" if limit_words(e) else "")
        rows.append(Row((name, format_bytes(e.anatomy.peak_bytes), format_bytes(e.anatomy.host_bytes)), note))
    console.print(TextTable([TextColumn("case", right=False), TextColumn("peak"), TextColumn("host")], rows))


def chart(timeline: Sequence[Moment], width: int, *, unicode: bool) -> list[str]:
    """Return memory over the step as lines: columns of the highest of each stretch, the phases beneath.

    Args:
        timeline: of the step.
        width: of the lines.
        unicode: whether eighths of a block can be shown.
    """
    cells = max(width - _LEFT, 10)
    last = max(timeline[-1].at, 1)
    heights, phases = [0] * cells, [""] * cells
    # A stretch without an event of its own is as high as the moment before it.
    before = (0, "")
    moments = iter(timeline)
    moment = next(moments, None)
    for cell in range(cells):
        end = last * (cell + 1) / cells
        highest = before
        while moment is not None and (moment.at < end or cell == cells - 1):
            before = (sum(moment.by_category.values()), moment.phase)
            highest = max(highest, before, key=lambda item: item[0])
            moment = next(moments, None)
        heights[cell], phases[cell] = highest[0], before[1]
    top = max(*heights, 1)
    blocks = _BLOCKS if unicode else _PLAIN
    steps = len(blocks) - 1
    lines = []
    for row in reversed(range(_ROWS)):
        label = format_bytes(top) if row == _ROWS - 1 else "0" if row == 0 else ""
        filled = [min(max(round(h / top * _ROWS * steps) - row * steps, 0), steps) for h in heights]
        lines.append(f"{label:>{_LEFT - 1}} " + "".join(blocks[level] for level in filled).rstrip())
    most: dict[str, int] = {}
    for moment in timeline:
        most[moment.phase] = max(most.get(moment.phase, 0), sum(moment.by_category.values()))
    told = ", ".join(f"{phase} {format_bytes(size)}" for phase, size in most.items())
    return [*lines, " " * _LEFT + _phase_line(phases), f"highest: {told}"]


def _phase_line(phases: Sequence[str]) -> str:
    """The names of the phases where they begin, as far as there is room."""
    line, start = "", 0
    for cell in range(1, len(phases) + 1):
        if cell == len(phases) or phases[cell] != phases[start]:
            room = cell - start
            line += (f"|{phases[start]}" if len(phases[start]) < room else "|").ljust(room)
            start = cell
    return line.rstrip()
