"""The questions that pictures and charts answer, and how numbers become marks, in PNG and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cpbench.record import Record
from cpbench.report.palette import PHASES, category_colors
from cpbench.report.series import Overview, Panel, Series, point_at, shared_length
from cpbench.units import GIB, KIB, MIB, format_bytes, format_length, format_rate, format_seconds

MAX_PANELS = 8
"""More panels than this make a picture that nobody reads; the rest is in the tables only."""

_MAX_SEGMENTS = 11
_LOG_FROM = 5.0
"""Largest over smallest number from which the y axis is logarithmic (and says so)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A quantity drawn against the length, one line a series."""

    name: str
    """Of the PNG and of the chart on the page."""
    title: str
    axis: str
    """Title of the y axis, without unit."""
    field: str
    """Field of the record."""
    unit: Literal["bytes", "rate"]
    note: str
    """What a reader must know."""

    def value(self, record: Record) -> float | None:
        """Return the number to draw, or None."""
        number: float | None = getattr(record, self.field)
        return number

    def show(self, value: float) -> str:
        """Return the number for people."""
        return format_bytes(value) if self.unit == "bytes" else f"{format_rate(value)} tokens/s"

    def scale(self, panel: Panel) -> tuple[float, str]:
        """Return what to divide by and the axis title with its unit, by the panel's largest number."""
        numbers = [self.value(point.record) or 0.0 for series in panel.series for point in series.plotted]
        if self.unit == "rate":
            return 1.0, self.axis
        return byte_scale(self.axis, max(numbers, default=0.0))

    def spans_decades(self, panel: Panel) -> bool:
        """Whether a linear axis would squeeze the small numbers together, so that a log axis reads better."""
        found = [self.value(point.record) or 0.0 for series in panel.series for point in series.plotted]
        numbers = [number for number in found if number > 0]
        return bool(numbers) and max(numbers) / min(numbers) > _LOG_FROM


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One part of a stacked bar."""

    name: str
    color: str
    values: tuple[float, ...]
    """One for each bar, in bytes or seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """Stacked bars of one panel at one length."""

    length: int
    bars: tuple[Series, ...]
    totals: tuple[str, ...]
    """Text at the end of each bar."""
    segments: tuple[Segment, ...]
    absent: tuple[str, ...]
    """Labels of the series without a value at this length."""

    @property
    def where(self) -> str:
        """The length in words."""
        return f"at {format_length(self.length)} tokens"

    @property
    def caption(self) -> str:
        """The length, and who is missing there."""
        return f"{self.where}. {self.absence}" if self.absence else self.where

    @property
    def absence(self) -> str:
        """Who is missing there, as a sentence; empty when nobody is."""
        return f"Without a result there: {', '.join(self.absent)}." if self.absent else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A quantity that has parts, drawn as stacked bars at the longest common length."""

    name: str
    title: str
    axis: str
    unit: Literal["bytes", "seconds"]
    note: str
    parts: Callable[[Record], dict[str, float]]
    total: Callable[[Record], float | None]

    def show(self, value: float | None) -> str:
        """Return the number for people."""
        return format_bytes(value) if self.unit == "bytes" else format_seconds(value)

    def scale(self, bars: Bars) -> tuple[float, str]:
        """Return what to divide by and the axis title with its unit."""
        largest = max(sum(segment.values[i] for segment in bars.segments) for i in range(len(bars.bars)))
        if self.unit == "bytes":
            return byte_scale(self.axis, largest)
        return (1.0, f"{self.axis} (s)") if largest >= 1 else (1e-3, f"{self.axis} (ms)")

    def bars(self, panel: Panel) -> Bars | None:
        """Return the bars of a panel, or None where no case has parts."""
        length, having = shared_length(panel, lambda record: any(self.parts(record).values()))
        if length is None:
            return None
        records = [point_at(series, length).record for series in having]
        table = [self.parts(record) for record in records]
        return Bars(
            length=length,
            bars=having,
            totals=tuple(self.show(self.total(record)) for record in records),
            segments=self._segments(table),
            absent=tuple(series.label for series in panel.series if series not in having),
        )

    def _segments(self, table: list[dict[str, float]]) -> tuple[Segment, ...]:
        if self.unit == "seconds":
            names = {name: color for _, name, color in PHASES}
            return tuple(
                Segment(name=name, color=color, values=tuple(row.get(name, 0.0) for row in table))
                for name, color in names.items()
            )
        largest = {key: max(row.get(key, 0.0) for row in table) for row in table for key in row}
        colors = category_colors(largest, _MAX_SEGMENTS)
        rest = {key for key in largest if key not in colors} | {"other"}
        segments = []
        for name, color in colors.items():
            keys = rest if name == "other" else {name}
            values = tuple(sum(row.get(key, 0.0) for key in keys) for row in table)
            if any(values):
                segments.append(Segment(name=name.replace("_", " "), color=color, values=values))
        return tuple(segments)


def byte_scale(axis: str, largest: float) -> tuple[float, str]:
    """Return the divisor and the axis title for numbers of bytes up to `largest`."""
    for factor, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if largest >= factor:
            return factor, f"{axis} ({unit})"
    return 1.0, f"{axis} (bytes)"


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten from just below `low` to just above `high`; both positive."""
    steps = [
        m * 10.0**e
        for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
    ]
    first = max((step for step in steps if step <= low), default=steps[0])
    last = min((step for step in steps if step >= high), default=steps[-1])
    ticks = [step for step in steps if first <= step <= last]
    if len(ticks) <= 12:
        return ticks
    return [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def log_title(title: str) -> str:
    """Return the title of a linear axis as the one of a logarithmic axis."""
    return f"{title.removesuffix(')')}, log scale)" if title.endswith(")") else f"{title} (log scale)"


def format_tick(value: float) -> str:
    """Return a number of an axis, with a thousands separator and without a needless fraction."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:g}"


def shown_panels(overview: Overview) -> tuple[tuple[Panel, ...], str]:
    """Return the panels to draw, and a sentence about those that are left to the tables."""
    rest = len(overview.panels) - MAX_PANELS
    note = f"{rest} more settings are in the table only." if rest > 0 else ""
    return overview.panels[:MAX_PANELS], note


def _phases(record: Record) -> dict[str, float]:
    values = {name: getattr(record, field) for field, name, _ in PHASES}
    return {name: value for name, value in values.items() if value is not None}


LINES: tuple[Line, ...] = (
    Line(
        name="peak_memory",
        title="Peak memory against sequence length",
        axis="Peak allocated",
        field="peak_allocated_bytes",
        unit="bytes",
        note="Peak of bytes in live device tensors during one training step, on the rank that needs most.",
    ),
    Line(
        name="throughput",
        title="Throughput against sequence length",
        axis="Tokens/s per rank",
        field="tokens_per_second_per_gpu",
        unit="rate",
        note="Tokens of a step over the median step time and the ranks; a rank is a GPU, or a CPU process.",
    ),
    Line(
        name="attention_intermediates",
        title="Attention intermediates against sequence length",
        axis="Attention",
        field="attention_intermediate_peak_bytes",
        unit="bytes",
        note="Peak of what an attention block holds beyond its input and output; the rank that needs most.",
    ),
)

SPLITS: tuple[Split, ...] = (
    Split(
        name="memory_by_category",
        title="Where the memory goes at the peak",
        axis="Live bytes at the peak",
        unit="bytes",
        note="Live bytes of each category at the moment of the peak, on the rank with the highest peak.",
        parts=lambda record: dict(record.peak_by_category_bytes),
        total=lambda record: record.peak_allocated_bytes,
    ),
    Split(
        name="step_time_split",
        title="Where the step time goes",
        axis="Step time",
        unit="seconds",
        note="Medians of the slowest rank; each part has its own median, so parts need not add up to the "
        "whole step, whose median stands at the end of the bar.",
        parts=_phases,
        total=lambda record: record.step_seconds,
    ),
)
