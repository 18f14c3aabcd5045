"""Panels to PNG files with matplotlib: light ground, legend outside, every label readable at full size.

A case without a number is an `x` in the strip above its panel, at its length, with the outcome in words:
never a zero on the curve.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.report.palette import MODE_DASH
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
from cpbench.report.series import Overview, Panel, Series, outcome_runs
from cpbench.units import format_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

INK, SOFT, _GRID = "#1c2430", "#5b6675", "#e3e7ec"
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # text of a record is never a formula
    "text.color": INK,
    "axes.edgecolor": "#b6bec9",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
MARKER = {
    "circle": "o",
    "square": "s",
    "triangle-up": "^",
    "triangle-down": "v",
    "diamond": "D",
    "cross": "P",
    "pentagon": "p",
    "hexagon": "h",
    "star": "*",
    "star-square": "X",
}
DASH: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1.2, 1.6))}
_PANEL_WIDTH, _LINE_HEIGHT, _STRIP_HEIGHT, _BAR_HEIGHT = 7.2, 3.7, 0.25, 0.42  # inches
_STRIP_GAP, _GAP, _TITLE_LINE = 0.1, 0.72, 0.24
_DPI = 144
_HEADING = "heading"


def write_pictures(overview: Overview, folder: Path) -> tuple[Path, ...]:
    """Write one PNG for each question into `folder` and return their paths; names never come from records."""
    import matplotlib as mpl

    paths = []
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # A foreign name may have characters that the font lacks; a box in the picture is the right answer.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for line in LINES:
            paths.append(_save(_line_figure(line, overview), folder / f"{line.name}.png"))
        for split in SPLITS:
            paths.append(_save(_split_figure(split, overview), folder / f"{split.name}.png"))
    return tuple(paths)


def _save(figure: Figure, path: Path) -> Path:
    _align_heading(figure)
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", pad_inches=0.25, metadata={"Software": None})
    return path


def _line_figure(line: Line, overview: Overview) -> Figure:
    panels, note = shown_panels(overview)
    strips = [_STRIP_HEIGHT * sum(bool(series.missing) for series in panel.series) for panel in panels]
    heights = [_LINE_HEIGHT + (strip + _STRIP_GAP if strip else 0) for strip in strips]
    titles = [panel.title for panel in panels]
    figure, rows = _canvas(line.title, f"{overview.subtitle}\n{line.note} {note}", heights, titles)
    for panel, place, strip in zip(panels, rows, strips, strict=True):
        axes = figure.add_axes(place.within(0, _LINE_HEIGHT))
        _draw_lines(axes, line, panel)
        top = axes
        if strip:
            top = figure.add_axes(place.within(_LINE_HEIGHT + _STRIP_GAP, strip), sharex=axes)
            _draw_strip(top, panel)
        _panel_title(top, place)
        _series_legend(top, panel)
    return figure


def _draw_lines(axes: Axes, line: Line, panel: Panel) -> None:
    divisor, title = line.scale(panel)
    drawn: list[float] = []
    for series in panel.series:
        points = [
            (p.record.seq_len, v / divisor) for p in series.plotted if (v := line.value(p.record)) is not None
        ]
        drawn += [y for _, y in points]
        axes.add_line(_line_of(series, [x for x, _ in points], [y for _, y in points]))
    if not drawn:
        axes.text(0.5, 0.5, "no case has a number here", transform=axes.transAxes, ha="center", color=SOFT)
        axes.set_yticks([])
    _length_axis(axes, panel)
    _value_axis(axes, title, drawn, log=line.spans_decades(panel))


def _line_of(series: Series, x: Sequence[float], y: Sequence[float]) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D(
        x,
        y,
        color=series.color,
        marker=MARKER[series.marker],
        linestyle=DASH[MODE_DASH[series.identity.mode]],
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.7,
        linewidth=2,
    )


def _value_axis(axes: Axes, title: str, values: Sequence[float], *, log: bool) -> None:
    """From zero; or logarithmic, said in the title, with ticks at 1, 2 and 5."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if log:
        ticks = log_ticks(min(value for value in values if value > 0), max(values))
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(ticks[0], ticks[-1])
        title = log_title(title)
    else:
        axes.set_ylim(0, max(values, default=0) * 1.06 or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    axes.set_ylabel(title)


def _length_axis(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    lengths = panel.lengths

    axes.set_xscale("log", base=2)
    ticks = thinned(lengths, 12)
    axes.xaxis.set_major_locator(FixedLocator([float(tick) for tick in ticks]))
    axes.xaxis.set_major_formatter(FixedFormatter([format_length(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    span = lengths[-1] / lengths[0]
    pad = max(1.12, span**0.05)
    # Words stand to the left of a mark.
    axes.set_xlim(lengths[0] / (max(1.3, span**0.13) if panel.words_first else pad), lengths[-1] * pad)
    axes.set_xlabel("Sequence length (tokens, log scale)")


def thinned(lengths: Sequence[int], most: int) -> list[int]:
    """Return at most about `most` lengths, far enough apart on a log axis for labels; always the longest."""
    apart = max(math.log2(lengths[-1] / lengths[0]) / most, 1e-9)
    kept = [lengths[-1]]
    for length in reversed(lengths[:-1]):
        if math.log2(kept[-1] / length) >= apart * 0.999:
            kept.append(length)
    return kept[::-1]


def _draw_strip(axes: Axes, panel: Panel) -> None:
    """One row for each series with cases that gave no number."""
    failing = [series for series in panel.series if series.missing]
    axes.set_ylim(len(failing) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_facecolor("#f6f7f9")
    axes.tick_params(bottom=False, labelbottom=False, left=False, labelleft=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    for row, series in enumerate(failing):
        for point, words in outcome_runs(series, panel.lengths):
            axes.plot(
                point.record.seq_len, row, marker="x", color=series.color, markersize=7, markeredgewidth=2.2
            )
            axes.annotate(
                words,
                (point.record.seq_len, row),
                xytext=(-8, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8.5,
                color=SOFT,
            )


def _series_legend(axes: Axes, panel: Panel) -> None:
    from matplotlib.lines import Line2D

    handles = [_line_of(series, [], []) for series in panel.series]
    labels = [_wrapped(series.label, 34) for series in panel.series]
    if any(series.missing for series in panel.series):
        handles.append(
            Line2D([], [], color=SOFT, marker="x", linestyle="", markersize=7, markeredgewidth=2.2)
        )
        labels.append("no number: see the strip on top")
    axes.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, handlelength=2.6
    )


def _split_figure(split: Split, overview: Overview) -> Figure:
    panels, note = shown_panels(overview)
    charts = [split.bars(panel) for panel in panels]
    heights = [_BAR_HEIGHT * (len(bars.bars) if bars else 2) + 0.1 for bars in charts]
    titles = [
        ", ".join(part for part in (panel.title, bars.caption if bars else "") if part)
        for panel, bars in zip(panels, charts, strict=True)
    ]
    figure, rows = _canvas(split.title, f"{overview.subtitle}\n{split.note} {note}", heights, titles)
    for bars, place in zip(charts, rows, strict=True):
        axes = figure.add_axes(place.within(0, place.height))
        if bars is None:
            axes.text(
                0.5, 0.5, "no case has a number here", transform=axes.transAxes, ha="center", color=SOFT
            )
            axes.set(xticks=[], yticks=[])
        else:
            _draw_bars(axes, split, bars)
        _panel_title(axes, place)
    return figure


def _draw_bars(axes: Axes, split: Split, bars: Bars) -> None:
    divisor, title = split.scale(bars)
    positions = list(range(len(bars.bars)))
    left = [0.0] * len(positions)
    for segment in bars.segments:
        widths = [value / divisor for value in segment.values]
        axes.barh(
            positions,
            widths,
            left=left,
            height=0.66,
            color=segment.color,
            edgecolor="white",
            linewidth=0.5,
            label=_plain(segment.name, 40),
        )
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for position, end, text in zip(positions, left, bars.totals, strict=True):
        axes.annotate(
            text,
            (end, position),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=INK,
        )
    axes.set_yticks(positions, [_wrapped(series.label, 34) for series in bars.bars], color=INK)
    axes.set_ylim(len(positions) - 0.5, -0.5)
    axes.set_xlim(0, max(left) * 1.14 or 1)
    axes.set_xlabel(title)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, handlelength=1.1, handleheight=1.1
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a panel stands: inches from the bottom of a figure of `total` inches, without its title."""

    bottom: float
    height: float
    total: float
    title: str

    def within(self, offset: float, height: float) -> tuple[float, float, float, float]:
        """The rectangle of axes that start `offset` inches above the panel's bottom, in figure units."""
        return 0, (self.bottom + offset) / self.total, 1, height / self.total


def _canvas(
    title: str, subtitle: str, heights: Sequence[float], titles: Sequence[str]
) -> tuple[Figure, list[_Place]]:
    """A figure with its heading, and the place of each panel from the top down.

    The axes fill the figure's width; `bbox_inches="tight"` adds room for the labels and legends around them.
    """
    from matplotlib.figure import Figure

    text = "\n".join(_wrapped(part, 118) for part in subtitle.split("\n"))
    wrapped = [_wrapped(title, 84) if title else "" for title in titles]
    heads = [_TITLE_LINE * (title.count("\n") + 1) + 0.08 if title else 0 for title in wrapped]
    heading = 0.52 + 0.19 * (text.count("\n") + 1)
    total = heading + sum(heights) + sum(heads) + _GAP * (len(heights) - 1)
    figure = Figure(figsize=(_PANEL_WIDTH, total))
    figure.text(0, 1, title, fontsize=15, fontweight="bold", va="top", gid=_HEADING)
    figure.text(0, 1 - 0.33 / total, text, fontsize=9.5, color=SOFT, va="top", linespacing=1.35, gid=_HEADING)
    places, top = [], total - heading
    for height, head, words in zip(heights, heads, wrapped, strict=True):
        places.append(_Place(top - head - height, height, total, words))
        top -= head + height + _GAP
    return figure, places


def _panel_title(axes: Axes, place: _Place) -> None:
    if place.title:
        axes.set_title(place.title, loc="left", fontsize=11, fontweight="bold", color=INK)


def _align_heading(figure: Figure) -> None:
    """Start the heading where the labels of the panels start."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    left = min(box.x0 for box in boxes if box is not None) / figure.bbox.width
    for text in figure.texts:
        if text.get_gid() == _HEADING:
            text.set_x(left)


def _plain(text: str, most: int) -> str:
    """One line of printable text; a leading underscore would hide a legend entry."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= most else line[: most - 3] + "..."
    return f" {line}" if line.startswith("_") else line


def _wrapped(text: str, width: int) -> str:
    lines = textwrap.wrap(_plain(text, 6 * width), width, break_on_hyphens=False) or [""]
    return "\n".join([f" {lines[0]}" if lines[0].startswith("_") else lines[0], *lines[1:]])
