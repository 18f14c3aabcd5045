"""Tables of cases and records for the terminal: the columns that a sweep needs and no others.

What differs between the cases names them: in columns, and the options, as well as columns for which a narrow window has
no room, under the method.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from cpbench.case import STACKS, Case
from cpbench.errors import without_name
from cpbench.expand import ResolvedCase
from cpbench.record import Record, Status
from cpbench.text_table import Row, TextColumn, TextTable
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
_ALWAYS = ("method", "length", "world")
_IF_VARYING = ("model", "stack", "dtype", "batch")
_LEFT = ("method", "model", "stack", "dtype", "status")
_NUMBERS = (
    TextColumn("peak memory", narrow="peak\nmemory"),
    TextColumn("step"),
    TextColumn("tokens/s/rank", narrow="tokens/s\n/rank"),
)
Cells = Sequence[str | Text]


class CaseNames:
    """How the cases of a sweep are told apart."""

    def __init__(self, cases: Sequence[Case | Record]) -> None:
        """Compare all cases of a sweep.

        Args:
            cases: all of them; only these can be named.
        """
        self.columns = _ALWAYS + tuple(
            name for name in _IF_VARYING if len({_cell(case, name) for case in cases}) > 1
        )
        """Headings: always method, length, world; others where cases differ."""
        self._varying: dict[str, tuple[str, ...]] = {}
        for method in dict.fromkeys(case.method for case in cases):
            sets = [case.options for case in cases if case.method == method]
            keys = sorted({key for options in sets for key in options})
            self._varying[method] = tuple(
                key for key in keys if len({_value(options.get(key)) for options in sets}) > 1
            )

    def cells(self, case: Case | Record, columns: Sequence[str] | None = None) -> list[str]:
        """Return the text of a case in each column."""
        return [_cell(case, name) for name in (self.columns if columns is None else columns)]

    def options(self, case: Case | Record) -> str:
        """Return the options in which cases of its method differ, or an empty text."""
        keys = self._varying.get(case.method, ())
        return ", ".join(f"{key}={_value(case.options[key])}" for key in keys if key in case.options)

    def title(self, case: Case | Record) -> str:
        """Return a line that no other case has, for example `upipe  tiny  128K  x4  stage_heads=8`."""
        further = [_cell(case, name) for name in self.columns if name in ("stack", "dtype")]
        if "batch" in self.columns:
            further.append(f"batch={case.batch_size}")
        parts = [case.method, case.model, format_length(case.seq_len), f"x{case.world_size}", *further]
        return "  ".join(part for part in (*parts, self.options(case)) if part)


def case_table(
    cases: Sequence[Case | Record],
    cells: Callable[[Case | Record], Cells],
    headings: Sequence[TextColumn],
    *,
    names: CaseNames,
    width: int,
) -> TextTable:
    """Return a table of cases in which no number is cut, down to about 50 columns.

    Args:
        cases: the rows.
        cells: the further cells of a case.
        headings: theirs.
        names: of all cases of the sweep.
        width: of the window.
    """
    columns, under = list(names.columns), list[str]()
    while True:
        rows = []
        for case in cases:
            words = [f"{name}={_cell(case, name)}" for name in under]
            note = ", ".join(part for part in (*words, names.options(case)) if part)
            rows.append(Row((*names.cells(case, columns), *cells(case)), Text(note, style="dim")))
        shown = [TextColumn(name, right=name not in _LEFT) for name in columns]
        table = TextTable([*shown, *headings], rows, note="options")
        if table.needed() <= width or len(columns) == 1:
            return table
        under.insert(0, columns.pop())


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


def emulation_cells(record: Record) -> list[str]:
    """Return measured compute, modelled communication, and by how much the estimate of the peak is off."""
    return [
        format_seconds(record.compute_seconds),
        format_seconds(record.communication_seconds),
        format_error(record.estimate_error),
    ]


RESULTS = (TextColumn("status", right=False), *_NUMBERS)
"""Headings of a status and `record_cells`."""


def print_summary(records: Sequence[Record], console: Console) -> None:
    """Print the table of a finished sweep, then every reason and warning."""
    if not records:
        return
    names = CaseNames(records)
    found = {record.case_id: record for record in records}
    modes = ", ".join(sorted({f"{record.mode} on {record.device}" for record in records}))
    console.print(Text(f"mode {modes}", style="bold"))

    def cells(case: Case | Record) -> Cells:
        record = found[case.case_id]
        return [Text(record.status, style=STATUS_STYLE[record.status]), *record_cells(record)]

    console.print(case_table(records, cells, RESULTS, names=names, width=console.width))
    for record in records:
        reasons = [without_name(record.reason, record.method)] if record.reason else []
        if record.compute_seconds is not None:
            reasons.append(", ".join(map(" ".join, zip(_EMULATED, emulation_cells(record), strict=True))))
        for text in (*reasons, *(f"warning: {warning}" for warning in record.warnings)):
            line = Text(f"{names.title(record)}  {record.status}: {text}")
            console.print(line, soft_wrap=not console.is_terminal)


def print_cases(items: Sequence[ResolvedCase], console: Console) -> None:
    """Print the cases of a dry run: id, method, length, world, options, and why some are unsupported."""
    names = CaseNames([item.case for item in items])
    rows = []
    for item in items:
        options = ", ".join(f"{key}={_value(value)}" for key, value in sorted(item.case.options.items()))
        cells = [*names.cells(item.case), "no" if item.unsupported else "yes"]
        rows.append(Row(tuple(cells), f"{item.case.case_id}  {options}".rstrip()))
    columns = [TextColumn(name, right=name not in _LEFT) for name in names.columns]
    columns.append(TextColumn("supported", right=False))
    console.print(TextTable(columns, rows, note="case id, options"))
    for item in items:
        if item.unsupported:
            line = Text(f"{item.case.case_id}  unsupported: {item.unsupported}")
            console.print(line, soft_wrap=not console.is_terminal)


def _cell(case: Case | Record, name: str) -> str:
    if name == "length":
        return format_length(case.seq_len)
    if name == "world":
        return str(case.world_size)
    if name == "batch":
        return str(case.batch_size)
    if name == "stack":
        return next((known for known, stack in STACKS.items() if stack == case.stack), "custom")
    return str(getattr(case, name))


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
