"""Tables of cases and records for the terminal: the columns that a sweep needs and no others."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpbench.case import STACKS, Case
from cpbench.expand import ResolvedCase
from cpbench.record import Record, Status
from cpbench.units import format_bytes, format_error, format_length, format_rate, format_seconds

STATUS_STYLE: dict[Status, str] = {
    "ok": "green",
    "oom_device": "yellow",
    "oom_host": "yellow",
    "unsupported": "dim",
    "timeout": "red",
    "error": "red",
    "invalid": "magenta",
}
Columns = tuple[tuple[str, bool], ...]
"""(heading, right-aligned) of each."""

_ALWAYS: Columns = (("method", False), ("length", True), ("world", True))
_IF_VARYING: Columns = (
    ("model", False),
    ("stack", False),
    ("dtype", False),
    ("batch", True),
    ("options", False),
)
_REASON_WIDTH = 120
"""Terminals at least this wide show reasons as a column; narrower ones below the table."""
_NUMBERS_WIDTH = 90
"""Room that the other columns may take; a longer reason is repeated in full below the table."""


def case_columns(cases: Sequence[Case | Record]) -> Columns:
    """Return the columns that tell these cases apart: always method, length, world; others if they vary."""
    varying = tuple(column for column in _IF_VARYING if len({_cell(case, column[0]) for case in cases}) > 1)
    # Methods differ in options by nature; only one method with several option sets needs the column.
    sets = {(case.method, _cell(case, "options")) for case in cases}
    if len(sets) == len({case.method for case in cases}):
        varying = tuple(column for column in varying if column[0] != "options")
    return _ALWAYS + varying


def case_cells(case: Case | Record, columns: Columns = _ALWAYS) -> list[str]:
    """Return the text of a case in each column."""
    return [_cell(case, name) for name, _ in columns]


def record_cells(record: Record) -> list[str]:
    """Return peak memory, step time and tokens/s/rank as text; `-` where there is none.

    An emulated step without a modelled communication time has the measured compute alone, and says so.
    """
    step = format_seconds(record.step_seconds)
    if record.step_seconds is None and record.compute_seconds is not None:
        step = f"{format_seconds(record.compute_seconds)} compute"
    return [
        format_bytes(record.peak_allocated_bytes),
        step,
        format_rate(record.tokens_per_second_per_gpu),
    ]


_EMULATED = ("compute", "comm. modelled", "estimate error")
_EMULATED_WIDTH = 42


def emulation_cells(record: Record) -> list[str]:
    """Return measured compute, modelled communication, and by how much the estimate of the peak is off."""
    return [
        format_seconds(record.compute_seconds),
        format_seconds(record.communication_seconds),
        format_error(record.estimate_error),
    ]


def print_summary(records: Sequence[Record], console: Console) -> None:
    """Print the table of a finished sweep, then every reason and warning."""
    if not records:
        return
    columns = case_columns(records)
    wide = console.width >= _REASON_WIDTH
    modes = ", ".join(sorted({f"{record.mode} on {record.device}" for record in records}))
    console.print(Text(f"mode {modes}", style="bold"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in columns:
        table.add_column(name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
    table.add_column("status", no_wrap=True)
    for name in ("peak memory", "step", "tokens/s/rank"):
        table.add_column(name, justify="right", no_wrap=True)
    emulated = any(record.mode == "emulate" for record in records)
    for name in _EMULATED if wide and emulated else ():
        table.add_column(name, justify="right", no_wrap=True)
    failed = [record for record in records if record.reason]
    if wide and failed:
        table.add_column("reason", no_wrap=True, overflow="ellipsis", ratio=1)
    for record in records:
        status = Text(record.status, style=STATUS_STYLE[record.status])
        cells = [Text(cell) for cell in (*case_cells(record, columns), *record_cells(record))]
        cells.insert(len(columns), status)
        cells += [Text(cell) for cell in emulation_cells(record)] if wide and emulated else []
        if wide and failed:
            cells.append(Text((record.reason or "").split("\n")[0]))
        table.add_row(*cells)
    console.print(table)
    room = console.width - _NUMBERS_WIDTH - (_EMULATED_WIDTH if emulated else 0) if wide else 0
    for record in records:
        reason = record.reason or ""
        texts = [f"warning: {warning}" for warning in record.warnings]
        if record.compute_seconds is not None and not wide:
            texts.append(", ".join(map(" ".join, zip(_EMULATED, emulation_cells(record), strict=True))))
        if len(reason) > room or "\n" in reason:
            texts.insert(0, reason)
        for text in texts:
            where = "  ".join(case_cells(record, columns))
            line = Text(f"{where}  {record.status}: {text}")
            console.print(line, soft_wrap=not console.is_terminal)


def print_cases(items: Sequence[ResolvedCase], console: Console) -> None:
    """Print the cases of a dry run: id, method, length, world, options, and why some are unsupported."""
    columns = case_columns([item.case for item in items])
    columns = tuple(column for column in columns if column[0] != "options")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("case id", overflow="fold")
    for name, right in columns:
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    table.add_column("options", overflow="fold")
    table.add_column("supported", no_wrap=True)
    for item in items:
        cells = [item.case.case_id, *case_cells(item.case, columns), _cell(item.case, "options")]
        table.add_row(*(Text(cell) for cell in cells), Text("no" if item.unsupported else "yes"))
    console.print(table)
    for item in items:
        if item.unsupported:
            console.print(Text(f"{item.case.case_id}  unsupported: {item.unsupported}"))


def _cell(case: Case | Record, name: str) -> str:
    if name == "length":
        return format_length(case.seq_len)
    if name == "world":
        return str(case.world_size)
    if name == "batch":
        return str(case.batch_size)
    if name == "options":
        return ", ".join(f"{key}={_value(value)}" for key, value in sorted(case.options.items())) or "-"
    if name == "stack":
        return next((known for known, stack in STACKS.items() if stack == case.stack), "custom")
    return str(getattr(case, name))


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
