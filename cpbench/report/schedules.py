"""Pictures of recorded attention blocks: what ran in which lane, and what was alive beside it, over the same axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.block_schedule import Bar, BlockSchedule, Kind, Lane, Phase

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _SOFT, _HOST = "#1c2430", "#5b6675", "#b3261e"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": "#b6bec9",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e3e7ec",
    "hatch.linewidth": 0.7,
    "hatch.color": "white",
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "figure.facecolor": "white",
}
_DPI = 144
_LEFT = -0.125  # of the figure's width, where headings start
_LANES: tuple[tuple[Lane, str], ...] = (
    ("compute", "compute"),
    ("communication", "communication"),
    ("copy_out", "copy to host"),
    ("copy_in", "copy from host"),
)
_KINDS: dict[Kind, tuple[str, str, str]] = {
    "attention": ("#3b4a63", "white", "attention kernel"),
    "projection": ("#a9bcd6", _INK, "projection (GEMM)"),
    "elementwise": ("#e1e6ee", _INK, "merge, copy, conversion"),
    "all_to_all": ("#e6a23c", _INK, "all-to-all"),
    "all_gather": ("#c9742b", "white", "all-gather"),
    "send": ("#f3d38c", _INK, "to the next rank"),
    "copy": ("#7cc4b4", _INK, "copy"),
}
"""Colour, colour of the text on it, and name."""
_GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "q": ("#4b5fc0", ("q",)),
    "k, v": ("#88ccee", ("k", "v", "k, v")),
    "out": ("#44aa99", ("out",)),
    "dout": ("#ddcc77", ("dout",)),
    "dq": ("#cc6677", ("dq",)),
    "dk, dv": ("#aa4499", ("dk", "dv", "dk, dv")),
    "log-sum-exp": ("#6b6b6b", ("lse",)),
    "merge": ("#997700", ("merge",)),
    "tiles": ("#c3c9d2", ("tiles",)),
}
"""Colours after Paul Tol's "muted" scheme, in the order of the stack, bottom first."""
_WIDE, _PART = " float32", " part"
_WIDTH, _LANE, _AREA = 9.0, 0.34, 1.75  # inches
_HEAD, _FOOT, _GAP = 0.34, 0.24, 0.16
_MOST = 60  # slots in a row


@dataclass(frozen=True, slots=True)
class Block:
    """One recording in a picture."""

    schedule: BlockSchedule
    heading: str
    """Above it; empty for the only one."""


def write_schedule(blocks: Sequence[Block], title: str, subtitle: str, path: Path) -> None:
    """Write one PNG of one or more recordings, one below the other, on the same scales.

    Args:
        blocks: at least one.
        title: of the picture.
        subtitle: wrapped lines below it.
        path: of the PNG.
    """
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure = _figure(blocks, title, subtitle)
        figure.savefig(path, dpi=_DPI, bbox_inches="tight", pad_inches=0.2, metadata={"Software": None})


@dataclass(frozen=True, slots=True)
class _Row:
    block: Block
    phases: tuple[Phase, ...]
    first: bool

    @property
    def start(self) -> int:
        return self.phases[0].start

    @property
    def stop(self) -> int:
        return self.phases[-1].stop

    @property
    def lanes(self) -> list[tuple[Lane, str]]:
        used = {bar.lane for bar in self.block.schedule.bars}
        return [lane for lane in _LANES if lane[0] in used]


def _rows(block: Block) -> list[_Row]:
    """Phases side by side as long as they fit; one that does not fit is cut into equal pieces."""
    rows: list[list[Phase]] = [[]]
    for phase in block.schedule.phases:
        slots = phase.stop - phase.start
        pieces = -(-slots // _MOST)
        for piece in range(pieces):
            start = phase.start + slots * piece // pieces
            cut = phase.model_copy(
                update={"start": start, "stop": phase.start + slots * (piece + 1) // pieces}
            )
            if rows[-1] and cut.stop - rows[-1][0].start > _MOST:
                rows.append([])
            rows[-1].append(cut)
    return [_Row(block, tuple(phases), index == 0) for index, phases in enumerate(rows)]


def _figure(blocks: Sequence[Block], title: str, subtitle: str) -> Figure:
    from matplotlib.figure import Figure

    rows = [row for block in blocks for row in _rows(block)]
    heights = [
        _HEAD
        + _LANE * len(row.lanes)
        + _GAP
        + _AREA
        + _FOOT
        + (0.36 if row.first and row.block.heading else 0)
        for row in rows
    ]
    heading = 0.42 + 0.2 * (subtitle.count("\n") + 1)
    legend = 0.95
    total = heading + sum(heights) + legend
    figure = Figure(figsize=(_WIDTH, total))
    figure.text(_LEFT, 1, title, fontsize=14, fontweight="bold", va="top")
    figure.text(_LEFT, 1 - 0.31 / total, subtitle, fontsize=9, color=_SOFT, va="top", linespacing=1.35)
    widest = max(row.stop - row.start for row in rows)
    highest = max(max(_units(row.block.schedule)) for row in rows)
    top = total - heading
    for row, height in zip(rows, heights, strict=True):
        at = top
        if row.first and row.block.heading:
            figure.text(
                _LEFT, (at - 0.08) / total, row.block.heading, fontsize=11, fontweight="bold", va="top"
            )
            at -= 0.36
        width = (row.stop - row.start) / widest
        lanes = _LANE * len(row.lanes)
        above = figure.add_axes((0, (at - _HEAD - lanes) / total, width, lanes / total))
        below = figure.add_axes((0, (at - _HEAD - lanes - _GAP - _AREA) / total, width, _AREA / total))
        _draw_lanes(above, row, _WIDTH / widest)
        _draw_alive(below, row, highest * 1.3)
        top -= height
    _legends(figure, rows, legend / total)
    return figure


def _draw_lanes(axes: Axes, row: _Row, slot_inches: float) -> None:
    lanes = [lane for lane, _ in row.lanes]
    for bar in row.block.schedule.bars:
        if row.start <= bar.start < row.stop:
            _draw_bar(axes, bar, lanes.index(bar.lane), _depth(bar, row.block.schedule.bars), slot_inches)
    axes.set(xlim=(row.start, row.stop), ylim=(len(lanes) - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(len(lanes)), [name for _, name in row.lanes], fontsize=8.5)
    axes.tick_params(left=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_facecolor("#f6f7f9")
    for phase in row.phases:
        slots = phase.stop - phase.start
        axes.text(
            phase.start + slots / 2,
            -0.62,
            phase.name,
            ha="center",
            va="bottom",
            fontsize=9.5,
            fontweight="bold",
        )
        if phase.start > row.start:
            axes.axvline(phase.start, color=_SOFT, linewidth=1, linestyle=(0, (4, 2)))


def _depth(bar: Bar, bars: Sequence[Bar]) -> tuple[int, int]:
    """(place, number) of a bar among those of its lane that run at the same time."""
    together = [o for o in bars if o.lane == bar.lane and o.start < bar.stop and bar.start < o.stop]
    if len(together) == 1:
        return 0, 1
    return (1 if bar.name.startswith("d") else 0), 2


def _draw_bar(axes: Axes, bar: Bar, lane: int, depth: tuple[int, int], slot_inches: float) -> None:
    color, ink, _ = _KINDS[bar.kind]
    place, number = depth
    height = 0.8 / number
    y = lane - 0.4 + place * height
    axes.barh(
        y + height / 2,
        bar.stop - bar.start,
        left=bar.start,
        height=height,
        color=color,
        edgecolor="white",
        linewidth=0.8,
    )
    if bar.kind in ("elementwise", "attention"):
        return
    text = bar.name.removesuffix(_WIDE)
    slim = (bar.stop - bar.start) * slot_inches < 0.065 * len(text)
    axes.text(
        (bar.start + bar.stop) / 2,
        y + height / 2,
        text,
        ha="center",
        va="center_baseline" if not slim else "center",
        fontsize=7 if number == 1 and len(text) < 5 else 6,
        color=ink,
        rotation=90 if slim and number == 1 and len(text) > 1 else 0,
    )


def _draw_alive(axes: Axes, row: _Row, top: float) -> None:
    import numpy as np

    schedule = row.block.schedule
    slots = range(row.start, row.stop)
    edges = np.repeat(np.arange(row.start, row.stop + 1), 2)[1:-1]
    base = np.zeros(len(slots))
    for name, sizes in _stacked(schedule).items():
        values = np.array([sizes[slot] / schedule.unit_bytes for slot in slots])
        color, hatch = _look(name)
        axes.fill_between(
            edges,
            np.repeat(base, 2),
            np.repeat(base + values, 2),
            facecolor=color,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.25,
        )
        base = base + values
    axes.plot(edges, np.repeat(base, 2), color=_INK, linewidth=1)
    if any(schedule.host):
        host = np.array([schedule.host[slot] / schedule.unit_bytes for slot in slots])
        axes.plot(
            edges, np.repeat(np.minimum(host, top), 2), color=_HOST, linewidth=1.3, linestyle=(0, (4, 1.5))
        )
    _mark_peaks(axes, row, top)
    axes.set(xlim=(row.start, row.stop), ylim=(0, top), xticks=[])
    axes.yaxis.grid(visible=True)
    axes.set_axisbelow(True)
    axes.set_ylabel("alive (M)", fontsize=9)
    axes.tick_params(labelsize=8.5)
    for phase in row.phases[1:]:
        axes.axvline(phase.start, color=_SOFT, linewidth=1, linestyle=(0, (4, 2)))


def _mark_peaks(axes: Axes, row: _Row, top: float) -> None:
    """Mark the forward and the backward peak, if they lie in this row."""
    s = row.block.schedule
    totals = s.totals()
    stated = {True: s.stated_forward_peak_bytes, False: s.stated_backward_peak_bytes}
    for forward in (True, False):
        phases = [p for p in s.phases if (p.name == "forward") == forward]
        slot = max(range(phases[0].start, phases[-1].stop), key=totals.__getitem__)
        if not row.start <= slot < row.stop:
            continue
        peak = s.in_units(totals[slot])
        axes.plot(slot + 0.5, peak, marker="v", color=_INK, markersize=6, clip_on=False)
        where = "forward" if forward else "backward"
        formula = f"\nformula {s.in_units(stated[forward]):.2f} M" if stated[forward] else ""
        share = (slot + 0.5 - row.start) / (row.stop - row.start)
        side = "left" if share < 0.25 else "right" if share > 0.75 else "center"
        axes.annotate(
            f"{where} peak {peak:.2f} M{formula}",
            (slot + 0.5, peak),
            xytext=({"left": -4, "right": 4}.get(side, 0), 7),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=8.5,
            fontweight="bold",
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 0.8},
            zorder=10,
        )


def _stacked(schedule: BlockSchedule) -> dict[str, list[int]]:
    """Sums by group, plain tensors, float32 ones and parts apart, in the order of the stack."""
    found: dict[str, list[int]] = {}
    for group, (_, members) in _GROUPS.items():
        for suffix in ("", _WIDE, _PART, _PART + _WIDE):
            names = {member + suffix for member in members}
            columns = [sizes for name, sizes in schedule.alive.items() if name in names]
            if columns:
                found[group + suffix] = [sum(at) for at in zip(*columns, strict=True)]
    return found


def _look(name: str) -> tuple[str, str | None]:
    """Colour and hatch of a group."""
    base = name.removesuffix(_WIDE).removesuffix(_PART)
    hatch = ("////" if name.endswith(_WIDE) else "") + ("...." if _PART in name else "")
    return _GROUPS[base][0], hatch or None


def _units(schedule: BlockSchedule) -> list[float]:
    """What is alive on the device, and on the host, in each slot."""
    return [schedule.in_units(size) for size in (*schedule.totals(), *schedule.host)]


def _legends(figure: Figure, rows: Sequence[_Row], height: float) -> None:
    """What the colours mean, lanes first, below everything."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    schedules = [row.block.schedule for row in rows]
    used = {bar.kind for s in schedules for bar in s.bars}
    lanes: list[Artist] = [
        Patch(facecolor=color, label=name) for kind, (color, _, name) in _KINDS.items() if kind in used
    ]
    shown: dict[str, Artist] = {}
    for s in schedules:
        for name, sizes in _stacked(s).items():
            if max(sizes) > 0.004 * max(s.totals()):
                color, hatch = _look(name)
                shown[name] = Patch(
                    facecolor=color, hatch=hatch, edgecolor="white", linewidth=0, label=_words(name)
                )
    alive = list(shown.values())
    if any(size for s in schedules for size in s.host):
        alive.append(
            Line2D([], [], color=_HOST, linewidth=1.3, linestyle=(0, (4, 1.5)), label="in use on the host")
        )
    for handles, y in ((lanes, height), (alive, height * 0.72)):
        legend = figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(_LEFT, y),
            ncols=6,
            fontsize=8.5,
            frameon=False,
            borderaxespad=0,
            borderpad=0,
            columnspacing=1.4,
            handlelength=1.5,
        )
        figure.add_artist(legend)


def _words(name: str) -> str:
    """A group in the legend."""
    if _PART in name:
        return f"{name.replace(_PART, '')} of one block of keys"
    if name.startswith("merge"):
        return f"differences in the merge{name.removeprefix('merge')}"
    return "tiles of a fixed size" if name == "tiles" else name
