"""The columns of the results table: how a case becomes cells.

A cell is its text and the value it sorts by; escaping is the business of whoever shows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from cpbench.record import Record
from cpbench.report.identity import stack_words
from cpbench.report.palette import MODE_WORD
from cpbench.report.series import Point, Series
from cpbench.units import format_bytes, format_error, format_length, format_rate, format_seconds

MISSING = "-"
_SMALL_PART = 0.01
"""Parts of a critical path below this are not listed."""


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


def _number(name: str, show: Callable[[float | None], str]) -> Callable[[Point, Series], Cell]:
    def cell(point: Point, _: Series) -> Cell:
        value: float | None = getattr(point.record, name)
        return Cell(show(value), value)

    return cell


def _modelled(name: str, show: Callable[[float | None], str]) -> Callable[[Point, Series], Cell]:
    def cell(point: Point, _: Series) -> Cell:
        modelled = point.record.modelled
        value: float | None = None if modelled is None else getattr(modelled, name)
        return Cell(show(value), value)

    return cell


def critical_path(record: Record) -> str:
    """Return what a modelled step consists of along its critical path, the largest parts first."""
    parts = record.modelled.critical_path_seconds if record.modelled is not None else {}
    total = sum(parts.values())
    if total <= 0:
        return ""
    large = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{n.replace('/', ' ')} {s / total:.0%}" for n, s in large if s >= _SMALL_PART * total)


def _text(value: Callable[[Record], str]) -> Callable[[Point, Series], Cell]:
    return lambda point, _: Cell(value(point.record) or MISSING, value(point.record) or None)


def _status(point: Point, _: Series) -> Cell:
    return Cell(point.outcome.name, point.outcome.name, "good" if point.plotted else "bad")


def _loss_difference(point: Point, _: Series) -> Cell:
    relative = point.loss.relative
    return Cell(
        MISSING if relative is None else f"{relative:.1e}", relative, "bad" if point.loss.differs else ""
    )


def _float(value: float | None, digits: str = ".4g") -> str:
    return MISSING if value is None else format(value, digits)


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"


COLUMNS: tuple[Column, ...] = (
    Column(
        title="Method",
        about="Context-parallel method",
        cell=_text(lambda r: r.method),
        numeric=False,
        always=True,
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
    Column(
        title="Options",
        about="Options of the method",
        cell=_text(lambda r: ", ".join(f"{k}={json.dumps(v)}" for k, v in sorted(r.options.items()))),
        numeric=False,
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
        title="Estimate error",
        about="Emulation: the estimate of the same case and rank against its measured peak; + is too high",
        cell=_number("estimate_error", format_error),
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
        title="Exposed comm.",
        about="Estimate: time in which compute waits for collectives, by the time model",
        cell=_modelled("exposed_communication_seconds", format_seconds),
    ),
    Column(
        title="Exposed copies",
        about="Estimate: time in which compute waits for copies to or from host memory, by the time model",
        cell=_modelled("exposed_copy_seconds", format_seconds),
    ),
    Column(
        title="Compute",
        about="Emulation: measured, with copies on the device in place of communication; median over timed steps",
        cell=_number("compute_seconds", format_seconds),
    ),
    Column(
        title="Modelled comm.",
        about="Emulation: by how much communication prolongs the step, by the time model",
        cell=_number("communication_seconds", format_seconds),
    ),
    Column(
        title="Time +/-",
        about="Part by which a modelled step may be off, judged from the sources of the rates",
        cell=_modelled("uncertainty", lambda value: MISSING if value is None else f"{value:.0%}"),
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
    Column(
        title="Critical path",
        about="Estimate: what the modelled step consists of, along the chain that makes it as long as it is",
        cell=_text(critical_path),
        numeric=False,
    ),
    Column(title="Run", about="Run folder", cell=lambda p, _: Cell(p.entry.run, p.entry.run), numeric=False),
)
