"""The picture and the page of `cpbench explain`: one case, or several side by side."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.errors import RunFolderError
from cpbench.explanation import Explanation, Moment
from cpbench.record import write_text_atomically
from cpbench.report.explanation_words import categories, difference, limit_words, where, why
from cpbench.report.palette import category_colors
from cpbench.units import GIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _SOFT, _LIMIT = "#1c2430", "#5b6675", "#b3261e"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a model's name is never a formula
    "text.color": _INK,
    "axes.edgecolor": "#b6bec9",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "legend.frameon": False,
}
_GROUND: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
"""Behind a label that a line may cross."""
_WIDTH, _HEIGHT, _DPI = 7.6, 3.6, 144
_COLUMNS = 2
_NEAR = 25  # moments on each side of the peak
_LABEL = 0.25
"""About what part of the width the label of the peak takes."""
_PHASES = ("forward", "backward", "optimizer")


def write_explanation(explanations: Sequence[Explanation], folder: Path) -> tuple[Path, Path]:
    """Write `explain.html` and `explain.png` into a folder and return their paths.

    Args:
        explanations: one or more.
        folder: made if needed.

    Raises:
        RunFolderError: it cannot be written.
    """
    page, picture = folder / "explain.html", folder / "explain.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_picture(explanations, picture)
        write_text_atomically(page, render(explanations, picture.read_bytes()))
    except OSError as error:
        raise RunFolderError(
            f"{folder} cannot be written: {error.strerror or error}; choose another with --out"
        ) from error
    return page, picture


def write_picture(explanations: Sequence[Explanation], path: Path) -> None:
    """Write the PNG: memory over the step by category, cases side by side on one scale."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    with mpl.rc_context(_STYLE):
        columns = min(len(explanations), _COLUMNS)
        pairs = -(-len(explanations) // columns)
        width = _WIDTH * (1 if columns == 1 else 0.78 * columns)
        figure = Figure(figsize=(width, 2 * _HEIGHT * pairs), layout="constrained")
        grid = figure.subplots(2 * pairs, columns, sharey=True, squeeze=False)
        sizes: dict[str, int] = {}
        for explanation in explanations:
            for moment in explanation.anatomy.timeline:
                for name, size in moment.by_category.items():
                    sizes[name] = max(size, sizes.get(name, 0))
        colors = category_colors(sizes, most=11)
        top = max(e.anatomy.peak_bytes for e in explanations) / GIB
        for number in range(pairs * columns):
            row, column = 2 * (number // columns), number % columns
            axes, near = grid[row][column], grid[row + 1][column]
            if number >= len(explanations):
                axes.set_axis_off()
                near.set_axis_off()
                continue
            _draw(axes, explanations[number], colors, top)
            _draw_near(near, explanations[number], colors)
            if column == 0:
                axes.set_ylabel("Tensors on the device (GiB)")
                near.set_ylabel("Tensors on the device (GiB)")
        figure.suptitle(
            "Memory of one step, estimated over fake tensors", x=0.01, ha="left", fontsize=10, color=_SOFT
        )
        handles = [
            Patch(facecolor=color, label=name.replace("_", " ")) for name, color in reversed(colors.items())
        ]
        figure.legend(handles=handles, loc="outside right upper", fontsize=9)
        figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def _layers(moments: Sequence[Moment], names: Iterable[str]) -> list[list[float]]:
    """GiB of each category at each moment."""
    shown: dict[str, list[float]] = {name: [0.0] * len(moments) for name in names}
    for position, moment in enumerate(moments):
        for name, size in moment.by_category.items():
            shown[name if name in shown else "other"][position] += size / GIB
    return list(shown.values())


def _draw_near(axes: Axes, explanation: Explanation, colors: dict[str, str]) -> None:
    """The moments around the peak, each as wide as the next."""
    timeline, peak = explanation.anatomy.timeline, explanation.anatomy.peak
    middle = next(position for position, moment in enumerate(timeline) if moment.at == peak.at)
    start = max(0, middle - _NEAR)
    moments = timeline[start : middle + _NEAR + 1]
    layers = _layers(moments, colors)
    axes.stackplot(range(len(moments)), layers, colors=list(colors.values()), linewidth=0, step="post")
    axes.plot(
        middle - start + 0.5, explanation.anatomy.peak_bytes / GIB, marker="v", color=_INK, markersize=7
    )
    axes.set(xlim=(0, len(moments) - 1), xticks=[])
    axes.set_title("around the peak, every rise and fall", loc="left", fontsize=10, color=_SOFT)


def _draw(axes: Axes, explanation: Explanation, colors: dict[str, str], top: float) -> None:
    found = explanation.anatomy
    x = [moment.at for moment in found.timeline]
    axes.stackplot(x, _layers(found.timeline, colors), colors=list(colors.values()), linewidth=0, step="post")
    peak = found.peak_bytes / GIB
    axes.plot(found.peak.at, peak, marker="v", color=_INK, markersize=7, clip_on=False, zorder=5)
    share = found.peak.at / max(found.events, 1)
    axes.annotate(
        f"{format_bytes(found.peak_bytes)}\n{where(found.peak)}".replace(", ", ",\n"),
        (found.peak.at, peak),
        xytext=(8 if share < 0.5 else -8, 4),
        textcoords="offset points",
        ha="left" if share < 0.5 else "right",
        va="bottom",
        fontsize=9,
        fontweight="bold",
        bbox=_GROUND,
        zorder=6,
    )
    limit = explanation.device_bytes
    if limit is not None and limit / GIB < 1.6 * top:
        axes.axhline(limit / GIB, color=_LIMIT, linewidth=1.3, linestyle=(0, (5, 2)))
        axes.annotate(
            f"room on {explanation.case.hardware}: {format_bytes(limit)}",
            (0 if _free_left(share) else 1, limit / GIB),
            xycoords=axes.get_yaxis_transform(),
            xytext=(2 if _free_left(share) else -2, 3),
            textcoords="offset points",
            ha="left" if _free_left(share) else "right",
            fontsize=8.5,
            color=_LIMIT,
            bbox=_GROUND,
            zorder=6,
        )
    highest = top * 1.22 if limit is None or limit / GIB >= 1.6 * top else max(top * 1.22, limit / GIB * 1.08)
    axes.set(xlim=(0, max(found.events, 1)), ylim=(0, highest), xticks=[])
    _mark_phases(axes, found.timeline)
    axes.set_title(explanation.case.title, loc="left", fontsize=11, fontweight="bold", pad=20)


def _free_left(share: float) -> bool:
    """Whether the left end is further from the peak's label: left of a late peak, right of an early one."""
    begin, end = (share, share + _LABEL) if share < 0.5 else (share - _LABEL, share)
    return begin > 1 - end


def _mark_phases(axes: Axes, timeline: Sequence[Moment]) -> None:
    for name in _PHASES:
        inside = [moment.at for moment in timeline if moment.phase == name]
        if not inside:
            continue
        axes.axvline(inside[0], color=_SOFT, linewidth=0.8, linestyle=(0, (3, 2)))
        late = inside[0] > 0.85 * timeline[-1].at
        axes.annotate(
            name,
            (inside[0], 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-2 if late else 2, 4),
            textcoords="offset points",
            ha="right" if late else "left",
            fontsize=9,
            color=_SOFT,
            annotation_clip=False,
        )


def render(explanations: Sequence[Explanation], picture: bytes) -> str:
    """Return the HTML page: one file that needs no network; text of a case is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    bundled = Path(__file__).parent.parent / "_templates"
    folder = bundled if bundled.is_dir() else Path(__file__).parents[2] / "reports" / "templates"
    templates = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page: str = templates.get_template("explain.html.jinja").render(
        explanations=explanations,
        picture=base64.b64encode(picture).decode(),
        size=format_bytes,
        difference=difference,
        where=where,
        limits=limit_words,
        categories=categories(explanations),
        why=why(explanations, [e.case.title for e in explanations]) if len(explanations) == 2 else "",
    )
    return page
