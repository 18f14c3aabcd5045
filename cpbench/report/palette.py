"""Colours, markers and names that stay the same in every picture: a method looks alike everywhere.

The colours of methods follow Okabe and Ito, those of categories Paul Tol's "muted" scheme; both stay apart
under the common colour-vision deficiencies and are readable on a white and on a near-black ground.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cpbench.case import Mode
from cpbench.record import Status

METHOD_ORDER = ("single", "torch-ring", "ring", "ulysses", "usp", "fpdt", "offload", "upipe")
"""From the reference to the newest; plug-ins follow by name."""

_METHOD_STYLE: dict[str, tuple[str, str]] = {
    "single": ("#7d8794", "square"),
    "torch-ring": ("#8c6bb1", "pentagon"),
    "ring": ("#1f83c4", "circle"),
    "ulysses": ("#009e73", "triangle-up"),
    "usp": ("#cc79a7", "triangle-down"),
    "fpdt": ("#e69f00", "hexagon"),
    "offload": ("#56b4e9", "cross"),
    "upipe": ("#d55e00", "diamond"),
}
_PLUGIN_COLORS = ("#a6761d", "#b5a11c", "#d94f8a", "#2aa7a0", "#7570b3", "#8a9a3b")
_PLUGIN_MARKERS = ("star", "cross", "pentagon", "hexagon", "triangle-down", "star-square")

_CATEGORY_COLORS = {
    "sharded_parameters": "#4b5fc0",
    "gradients": "#88ccee",
    "optimizer": "#44aa99",
    "unsharded_parameters": "#2f8f4e",
    "communication_buffers": "#999933",
    "residual": "#ddcc77",
    "attention": "#cc6677",
    "mlp": "#aa4499",
    "norm": "#7b5fb0",
    "loss": "#b0743c",
    "kernel_scratch": "#6f9fa8",
    "workspace": "#5d6b78",
    "other": "#9aa3ad",
}
"""In the order of the stack: what a step always needs first, what it needs for a moment last."""
_UNKNOWN_CATEGORY_COLORS = ("#d9902f", "#5a8f3c", "#c7579a", "#5b7bb5", "#a8873f", "#7f6fae")

PHASES: tuple[tuple[str, str, str], ...] = (
    ("forward_seconds", "forward", "#4b8fd0"),
    ("backward_seconds", "backward", "#d9902f"),
    ("optimizer_seconds", "optimizer", "#3f9f7f"),
)
"""Record field, name and colour of each part of a step."""

MODE_DASH: dict[Mode, str] = {"measure": "solid", "emulate": "dash", "estimate": "dot"}
MODE_WORD: dict[Mode, str] = {"measure": "measured", "emulate": "emulated", "estimate": "estimated"}


@dataclass(frozen=True, slots=True)
class StatusWords:
    """How an outcome is named: beside a mark, in a table, and in a sentence."""

    short: str
    name: str
    long: str


STATUS_WORDS: dict[Status, StatusWords] = {
    "ok": StatusWords("ok", "ok", "finished"),
    "oom_device": StatusWords("OOM", "OOM", "out of device memory"),
    "oom_host": StatusWords("host OOM", "host OOM", "out of host memory"),
    "unsupported": StatusWords("unsup.", "unsupported", "the method cannot run this case"),
    "timeout": StatusWords("timeout", "timeout", "took longer than the time limit"),
    "error": StatusWords("error", "error", "ended with an error"),
    "invalid": StatusWords("invalid", "invalid", "finished, but its numbers cannot be true"),
}
LOSS_DIFFERS = StatusWords("loss differs", "loss differs", "its loss differs from the one of single")


def method_style(method: str, variant: int = 0) -> tuple[str, str]:
    """Return colour (#rrggbb) and marker of a method.

    Args:
        method: its name; a plug-in's style is derived from a hash of the name, so it stays the same.
        variant: 0 for the first series of the method in a panel; later ones get a shifted shade and marker.
    """
    if method in _METHOD_STYLE:
        color, marker = _METHOD_STYLE[method]
    else:
        digest = hashlib.sha256(method.encode("utf-8", "replace")).digest()
        color, marker = _PLUGIN_COLORS[digest[0] % 6], _PLUGIN_MARKERS[digest[1] % 6]
    if variant == 0:
        return color, marker
    markers = sorted({style[1] for style in _METHOD_STYLE.values()} | set(_PLUGIN_MARKERS))
    shade = (0.35, -0.22, 0.55, -0.36)[(variant - 1) % 4]
    return _shaded(color, shade), markers[(markers.index(marker) + variant) % len(markers)]


def method_rank(method: str) -> tuple[int, str]:
    """Return a sort key: built-in methods in their fixed order, then plug-ins by name."""
    return (METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER), method)


def category_colors(sizes: Mapping[str, float], most: int) -> dict[str, str]:
    """Return the colours of the categories to show, in the order of the stack, `other` last.

    Args:
        sizes: the largest size of each category.
        most: how many to show; the smallest of the others belong to `other`.
    """
    ranked = sorted(
        (name for name, size in sizes.items() if size > 0 and name != "other"), key=lambda n: -sizes[n]
    )
    kept = set(ranked[:most])
    known = [name for name in _CATEGORY_COLORS if name in kept]
    unknown = sorted(kept - set(known))
    colors = {name: _CATEGORY_COLORS[name] for name in known}
    colors |= {name: _UNKNOWN_CATEGORY_COLORS[i % 6] for i, name in enumerate(unknown)}
    return colors | {"other": _CATEGORY_COLORS["other"]}


def _shaded(color: str, amount: float) -> str:
    """Mix a colour with white (amount > 0) or black (amount < 0)."""
    target = 255 if amount > 0 else 0
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (target - part) * abs(amount)):02x}" for part in parts)
