"""The picture of `cpbench plan`: memory and speed against length, and the longest context against ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpbench.context_plan import ContextPlan, MethodPlan
from cpbench.report.palette import MODE_DASH, method_rank, method_style
from cpbench.report.plots import DASH, INK, MARKER, SOFT, STYLE
from cpbench.report.quantities import format_tick, log_ticks
from cpbench.units import GIB, MIB, format_bytes, format_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 7.2, 3.7  # inches of a panel
_DPI = 144


def write_plan_picture(found: ContextPlan, path: Path) -> Path:
    """Write the PNG: for one number of ranks memory and throughput, for several also the longest context of each."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    q = found.question
    several = len(q.worlds) > 1
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, _HEIGHT * (3 if several else 2)), layout="constrained")
        rows = list(figure.subplots(3 if several else 2, 1))
        figure.suptitle(
            f"{q.model} on {q.hardware}, {format_bytes(q.host_memory_bytes)} host memory a node: estimated",
            fontweight="bold",
            x=0.01,
            ha="left",
        )
        if several:
            _draw_worlds(rows.pop(0), found)
        ranks = max(q.worlds)
        plans = [plan for plan in found.methods if plan.world_size == ranks and plan.points]
        plans.sort(key=lambda plan: method_rank(plan.method))
        _draw_memory(rows[0], found, plans, ranks)
        _draw_speed(rows[1], plans, ranks)
        figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return path


def _draw_memory(axes: Axes, found: ContextPlan, plans: Sequence[MethodPlan], ranks: int) -> None:
    limit = found.device_memory_bytes / GIB
    axes.axhline(limit, color=INK, linewidth=1.2)
    axes.annotate(
        f"device: {limit:.1f} GiB",
        (0, limit),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=9,
        color=INK,
    )
    for plan in plans:
        _line(axes, plan, [point.device_needed_bytes / GIB for point in plan.points])
        for end in plan.points:
            if (
                plan.longest is not None
                and end.seq_len == plan.longest.seq_len
                and plan.ended_by == "host memory"
            ):
                axes.annotate(
                    "host full",
                    (end.seq_len, end.device_needed_bytes / GIB),
                    xytext=(8, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8.5,
                    color=SOFT,
                )
    axes.set_ylim(0, limit * 1.25)
    axes.set_ylabel("Needed by a rank (GiB)")
    axes.set_title(f"Device memory needed, {ranks} ranks", loc="left", fontsize=11)
    _length_axis(axes, plans)
    _legend(axes)


def _draw_speed(axes: Axes, plans: Sequence[MethodPlan], ranks: int) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    timed = [plan for plan in plans if all(p.tokens_per_second_per_gpu for p in plan.points)]
    for plan in timed:
        _line(axes, plan, [point.tokens_per_second_per_gpu or 0 for point in plan.points])
    rates = [point.tokens_per_second_per_gpu or 0 for plan in timed for point in plan.points]
    if rates:
        ticks = log_ticks(min(rates), max(rates))
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
        axes.set_ylim(ticks[0], ticks[-1])
    else:
        axes.text(0.5, 0.5, "the profile has no rates", transform=axes.transAxes, ha="center", color=SOFT)
    axes.set_ylabel("Tokens/s of a rank (log scale)")
    points = [point for plan in timed for point in plan.points]
    uncertainty = next((p.uncertainty for p in points if p.uncertainty), None)
    words = f", to {uncertainty:.0%}" if uncertainty else ""
    axes.set_title(f"Modelled throughput, {ranks} ranks{words}", loc="left", fontsize=11)
    _length_axis(axes, plans, log=True)  # a step grows with the square of the length: almost straight lines
    if timed:
        _legend(axes)


def _draw_worlds(axes: Axes, found: ContextPlan) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    worlds = sorted(found.question.worlds)
    for method in sorted(found.question.methods, key=method_rank):
        reached = {
            plan.world_size: plan.longest.seq_len / MIB
            for plan in found.methods
            if plan.method == method and plan.longest is not None
        }
        if reached:
            color, marker = method_style(method)
            axes.plot(
                sorted(reached),
                [reached[ranks] for ranks in sorted(reached)],
                color=color,
                marker=MARKER[marker],
                linestyle=DASH[MODE_DASH["estimate"]],
                label=method,
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([float(ranks) for ranks in worlds]))
    axes.xaxis.set_major_formatter(FixedFormatter([str(ranks) for ranks in worlds]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Ranks (log scale)")
    axes.set_ylabel("Longest context (M tokens)")
    axes.set_title("Longest context that fits", loc="left", fontsize=11)
    _legend(axes)


def _line(axes: Axes, plan: MethodPlan, values: Sequence[float]) -> None:
    color, marker = method_style(plan.method)
    words = plan.configuration.words.replace(", ", "\n")
    axes.plot(
        [point.seq_len for point in plan.points],
        values,
        color=color,
        marker=MARKER[marker],
        linestyle=DASH[MODE_DASH["estimate"]],
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.7,
        label=f"{plan.method}\n{words}" if words else plan.method,
    )


def _length_axis(axes: Axes, plans: Sequence[MethodPlan], *, log: bool = False) -> None:
    lengths = sorted({point.seq_len for plan in plans for point in plan.points})
    if not lengths:
        return
    shortest, longest = lengths[0], lengths[-1]
    if log:
        powers = [2**exponent for exponent in range(longest.bit_length() + 1)]
        axes.set_xscale("log", base=2)
        axes.set_xlim(shortest / 1.15, longest * 1.15)
        _ticks(
            axes,
            [n for n in powers if shortest <= n <= longest * 1.15],
            "Sequence length (tokens, log scale)",
        )
        return
    step = next(n for n in (MIB * 2**k // 4 for k in range(12)) if longest / n <= 12)
    axes.set_xlim(0, longest * 1.12)
    _ticks(axes, list(range(step, longest + step, step)), "Sequence length (tokens)")


def _ticks(axes: Axes, ticks: Sequence[int], label: str) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axes.xaxis.set_major_locator(FixedLocator([float(tick) for tick in ticks]))
    axes.xaxis.set_major_formatter(FixedFormatter([format_length(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:  # none where nothing fits on so many ranks
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, fontsize=9)
