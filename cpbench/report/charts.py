"""Panels to interactive charts: plotly figures as dictionaries, and the legends that the page draws itself.

Text of a record goes only into `text`, `hovertext` and names, with the markup characters escaped; plotly's
template strings (`%{...}`) are not used.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpbench.report.identity import format_ranks, mode_words
from cpbench.report.palette import MODE_DASH
from cpbench.report.plots import thinned
from cpbench.report.quantities import (
    LINES,
    SPLITS,
    Bars,
    Line,
    Split,
    format_tick,
    log_ticks,
    log_title,
    shown_panels,
)
from cpbench.report.series import Overview, Panel, Point, Series, outcome_runs
from cpbench.units import format_length, format_seconds

_STRIP_PIXELS, _LINE_PIXELS, _BAR_PIXELS = 19, 320, 34
_MARGIN = {"l": 56, "r": 12, "t": 10, "b": 52}  # pixels
_EMPTY = {
    "text": "no case has a number here",
    "xref": "paper",
    "yref": "paper",
    "x": 0.5,
    "y": 0.4,
    "showarrow": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LegendItem:
    """One entry of a chart's legend; `group` is the traces' legend group."""

    group: str
    label: str
    color: str
    marker: str
    dash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One chart of the page."""

    name: str
    """Made of our own names and numbers only, so it is safe as an id."""
    title: str
    """Of the panel; empty when there is one."""
    caption: str
    """Follows the title: the length of stacked bars."""
    note: str
    """Who is missing in stacked bars."""
    legend: tuple[LegendItem, ...]
    figure: dict[str, Any]
    """`data` and `layout` of plotly; colours of text and grid are set by the page for light or dark."""
    height: int
    """Pixels."""
    scales: dict[str, dict[str, Any]] | None = None
    """`linear` and `log`: the y axis on either scale; None where there is no choice."""
    log: bool = False
    """The chart starts on the log scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChartGroup:
    """The charts that answer one question."""

    name: str
    title: str
    note: str
    charts: tuple[Chart, ...]


def chart_groups(overview: Overview) -> tuple[ChartGroup, ...]:
    """Return the charts of every question, one a panel, in the order of the page."""
    panels, more = shown_panels(overview)
    lines = {
        line.name: ChartGroup(
            name=line.name,
            title=line.title,
            note=f"{line.note} {more}".strip(),
            charts=tuple(_line_chart(line, panel, number) for number, panel in enumerate(panels)),
        )
        for line in LINES
    }
    splits = {
        split.name: ChartGroup(
            name=split.name,
            title=split.title,
            note=f"{split.note} {more}".strip(),
            charts=tuple(
                _split_chart(split, panel, bars, number)
                for number, panel in enumerate(panels)
                if (bars := split.bars(panel)) is not None
            ),
        )
        for split in SPLITS
    }
    order = ("peak_memory", "throughput", "memory_by_category", "step_time_split", "attention_intermediates")
    return tuple((lines | splits)[name] for name in order)


def _line_chart(line: Line, panel: Panel, number: int) -> Chart:
    divisor, _ = line.scale(panel)
    scales, log = _scales(line, panel), line.spans_decades(panel)
    failing = [(f"s{i}", series) for i, series in enumerate(panel.series) if series.missing]
    curves = [_line_trace(line, series, f"s{i}", divisor) for i, series in enumerate(panel.series)]
    marks = [_strip_trace(series, panel.lengths, group, row) for row, (group, series) in enumerate(failing)]
    strip = len(failing) * _STRIP_PIXELS
    height = _LINE_PIXELS + strip
    border = 1 - strip / (height - _MARGIN["t"] - _MARGIN["b"])
    layout: dict[str, Any] = {
        "xaxis": _length_axis(panel),
        "yaxis": {
            "domain": [0, border - (0.02 if failing else 0)],
            "automargin": True,
            **scales["log" if log else "linear"],
        },
        "hovermode": "closest",
        "margin": _MARGIN,
    }
    if failing:
        layout["yaxis2"] = _strip_axis(border, len(failing))
    if not any(curve["x"] for curve in curves):
        layout["annotations"] = [_EMPTY]
    return Chart(
        name=f"{line.name}-{number}",
        title=panel.title,
        caption="",
        note="",
        legend=_legend(panel),
        figure={"data": curves + marks, "layout": layout},
        height=height,
        scales=scales,
        log=log,
    )


def _strip_axis(bottom: float, rows: int) -> dict[str, Any]:
    return {
        "domain": [bottom, 1],
        "range": [rows - 0.5, -0.5],
        "fixedrange": True,
        "showgrid": False,
        "zeroline": False,
        "showticklabels": False,
        "anchor": "x",
    }


def _line_trace(line: Line, series: Series, group: str, divisor: float) -> dict[str, Any]:
    points = [(point, value) for point in series.plotted if (value := line.value(point.record)) is not None]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": _safe(series.label),
        "legendgroup": group,
        "x": [point.record.seq_len for point, _ in points],
        "y": [value / divisor for _, value in points],
        "hovertext": [_hover(point, series, line, value) for point, value in points],
        "hoverinfo": "text",
        "line": {"color": series.color, "width": 2.5, "dash": MODE_DASH[series.identity.mode]},
        "marker": {"color": series.color, "symbol": series.marker, "size": 9},
    }


def _strip_trace(series: Series, lengths: Sequence[int], group: str, row: int) -> dict[str, Any]:
    """The cases of a series without numbers: an x at each length, in the strip above the curves."""
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": _safe(series.label),
        "legendgroup": group,
        "yaxis": "y2",
        "x": [point.record.seq_len for point in series.missing],
        "y": [row] * len(series.missing),
        "text": [f"{_safe(words)} " if words else "" for _, words in outcome_runs(series, lengths)],
        "textposition": "middle left",
        "textfont": {"size": 11},
        "hovertext": [
            f"<b>{_safe(series.label)}</b><br>{format_length(point.record.seq_len)} tokens: "
            f"{_safe(point.outcome.long)}<br>{_folded(point.record.reason or '')}"
            for point in series.missing
        ],
        "hoverinfo": "text",
        "cliponaxis": False,
        "marker": {
            "color": series.color,
            "symbol": "x-thin",
            "size": 9,
            "line": {"width": 3, "color": series.color},
        },
    }


def _scales(line: Line, panel: Panel) -> dict[str, dict[str, Any]]:
    """The y axis from zero, and logarithmic with ticks that say the whole number."""
    divisor, title = line.scale(panel)
    found = [(line.value(point.record) or 0) / divisor for series in panel.series for point in series.plotted]
    numbers = [number for number in found if number > 0] or [1.0]
    ticks = log_ticks(min(numbers), max(numbers))
    linear = {
        "type": "linear",
        "range": [0, max(numbers) * 1.08],
        "tickmode": "auto",
        "separatethousands": True,
    }
    log = {
        "type": "log",
        "title": _title(log_title(title)),
        "range": [math.log10(ticks[0]), math.log10(ticks[-1])],
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [format_tick(tick) for tick in ticks],
    }
    return {"linear": linear | {"title": _title(title), "exponentformat": "none"}, "log": log}


def _hover(point: Point, series: Series, line: Line, value: float) -> str:
    record = point.record
    rows = [
        f"<b>{_safe(series.label)}</b>",
        f"{format_length(record.seq_len)} tokens, {format_ranks(record.world_size)}",
        f"<b>{line.show(value)}</b>",
    ]
    spread = record.spread.get(line.field)
    if spread is not None and record.world_size > 1:
        rows.append(f"rank {spread.rank} of {record.world_size}; mean over ranks {line.show(spread.mean)}")
    if line.unit == "rate":
        rows.append(f"step {format_seconds(record.step_seconds)}, {len(record.step_seconds_samples)} samples")
    return "<br>".join([*rows, _folded(mode_words(series.identity))])


def _length_axis(panel: Panel) -> dict[str, Any]:
    lengths = panel.lengths
    ticks = thinned(lengths, 8)
    low, high = math.log10(lengths[0]), math.log10(lengths[-1])
    pad = max((high - low) * 0.06, 0.06)
    return {
        "type": "log",
        "title": _title("Sequence length (tokens, log scale)"),
        "tickvals": ticks,
        "ticktext": [format_length(tick) for tick in ticks],
        "tickangle": 0,
        "range": [low - (max((high - low) * 0.2, 0.2) if panel.words_first else pad), high + pad],
        "showgrid": False,
        "zeroline": False,
    }


def _split_chart(split: Split, panel: Panel, bars: Bars, number: int) -> Chart:
    names = ["<br>".join(map(_safe, textwrap.wrap(series.label, 20)[:4])) for series in bars.bars]
    bar = max(_BAR_PIXELS, 17 * max(name.count("<br>") + 1 for name in names) + 4)
    return Chart(
        name=f"{split.name}-{number}",
        title=panel.title,
        caption=bars.where,
        note=bars.absence,
        legend=tuple(
            LegendItem(group=f"s{i}", label=segment.name, color=segment.color, marker="block", dash="solid")
            for i, segment in enumerate(bars.segments)
        ),
        figure={
            "data": [_segment_trace(split, bars, index) for index in range(len(bars.segments))],
            "layout": _split_layout(split, bars, names),
        },
        height=72 + bar * len(names),
    )


def _segment_trace(split: Split, bars: Bars, index: int) -> dict[str, Any]:
    divisor, _ = split.scale(bars)
    segment = bars.segments[index]
    return {
        "type": "bar",
        "orientation": "h",
        "name": _safe(segment.name),
        "legendgroup": f"s{index}",
        # Positions, with the labels as ticks: two series with one label stay two bars.
        "y": list(range(len(bars.bars))),
        "x": [value / divisor for value in segment.values],
        "width": 0.68,
        "marker": {"color": segment.color},
        "hovertext": [
            f"<b>{_safe(series.label)}</b><br>{_safe(segment.name)}: <b>{split.show(value)}</b><br>"
            f"of {total} at {format_length(bars.length)}<br>{_folded(mode_words(series.identity))}"
            for series, value, total in zip(bars.bars, segment.values, bars.totals, strict=True)
        ],
        "hoverinfo": "text",
    }


def _split_layout(split: Split, bars: Bars, names: Sequence[str]) -> dict[str, Any]:
    divisor, axis = split.scale(bars)
    positions = list(range(len(names)))
    ends = [sum(segment.values[i] for segment in bars.segments) / divisor for i in positions]
    return {
        "barmode": "stack",
        "xaxis": {"title": _title(axis), "zeroline": False, "range": [0, max(ends) * 1.35 or 1]},
        "yaxis": {
            "tickvals": positions,
            "ticktext": names,
            "range": [len(names) - 0.5, -0.5],
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
        },
        "annotations": [
            {"x": end, "y": position, "text": total, "xanchor": "left", "xshift": 5, "showarrow": False}
            for position, end, total in zip(positions, ends, bars.totals, strict=True)
        ],
        "hovermode": "closest",
        "margin": _MARGIN | {"l": 12},
    }


def _legend(panel: Panel) -> tuple[LegendItem, ...]:
    return tuple(
        LegendItem(
            group=f"s{index}",
            label=series.label,
            color=series.color,
            marker=series.marker,
            dash=MODE_DASH[series.identity.mode],
        )
        for index, series in enumerate(panel.series)
    )


def _title(text: str) -> dict[str, Any]:
    """With a standoff, so that wide tick labels push the title away."""
    return {"text": text, "standoff": 8}


def _safe(text: str) -> str:
    """Plotly reads a few HTML tags in its text; records may not use them."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return html.escape(line, quote=False)


def _folded(text: str) -> str:
    """A long text as a few short lines for a hover box."""
    lines = textwrap.wrap(" ".join(text.split()), 56)
    return "<br>".join(_safe(line) for line in lines[:4]) + (" ..." if len(lines) > 4 else "")
