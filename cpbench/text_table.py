"""A table for the terminal whose numbers are never cut: a row's words stand beside it, or wrap beneath it.

rich's tables shrink every column when the window is narrow, numbers too.  Here only the note of a row, which holds
words, gives way: it stands in a last column if all notes fit there, else beneath its row over the width of the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

_INDENT = "  "
_LEAST_NOTE = 24
"""A note beside its row may wrap there if it has this much room; it takes at most `_BESIDE_LINES`."""
_BESIDE_LINES = 2


@dataclass(frozen=True, slots=True)
class TextColumn:
    """One column of numbers or short names."""

    heading: str
    right: bool = True
    narrow: str | None = None
    """The heading with line breaks, for windows in which the table does not fit otherwise."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row."""

    cells: tuple[str | Text, ...]
    note: str | Text = ""
    """What may wrap."""
    style: str = ""


class TextTable:
    """Rows under headings; rich renders it."""

    def __init__(self, columns: Sequence[TextColumn], rows: Sequence[Row], *, note: str = "") -> None:
        """Show rows.

        Args:
            columns: of the cells.
            rows: with a cell for each column.
            note: heading of the notes where they stand beside the rows.
        """
        self._columns = tuple(columns)
        self._rows = tuple(rows)
        self._note = note

    def needed(self) -> int:
        """Return the narrowest window in which no cell is cut."""
        return self._width(gap=1, narrow=True)

    def heights(self, width: int) -> list[int]:
        """Return the lines that the headings and then each row take in a window."""
        gap, narrow, _, beside = self._layout(width)
        widths = self._widths(narrow)
        headings = len(self._headings(narrow))
        return [headings, *(len(list(self._lines(row, widths, gap, width, beside))) for row in self._rows)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        gap, narrow, used, beside = self._layout(width)
        widths = self._widths(narrow)
        headings = self._headings(narrow)
        for number, line in enumerate(headings):
            text = self._joined([Text(part) for part in line], widths, gap)
            if beside and self._note and number == len(headings) - 1:
                text.append(" " * (used + gap - cell_len(text.plain)) + self._note)
            text.stylize("bold")
            yield _cut(text)
        for row in self._rows:
            yield from self._lines(row, widths, gap, width, beside)

    def _layout(self, width: int) -> tuple[int, bool, int, bool]:
        """(gap between columns, narrow headings, width of the cells, notes beside the rows): the roomiest that fits."""
        for gap, narrow in ((2, False), (2, True), (1, True)):
            used = self._width(gap=gap, narrow=narrow)
            if used <= width:
                break
        room = width - used - gap
        notes = [_text(row.note) for row in self._rows if row.note]
        if not notes:
            return gap, narrow, used, False
        longest = max(cell_len(self._note), *(cell_len(note.plain) for note in notes))
        beside = longest <= room or (
            room >= _LEAST_NOTE and longest <= _BESIDE_LINES * room - _LEAST_NOTE // 2
        )
        return gap, narrow, used, beside and "\n" not in "".join(note.plain for note in notes)

    def _headings(self, narrow: bool) -> list[list[str]]:
        """Lines of headings; short headings stand at the bottom."""
        parts = [
            (column.narrow or column.heading).split("\n") if narrow else [column.heading]
            for column in self._columns
        ]
        deep = max(map(len, parts))
        padded = [[""] * (deep - len(part)) + part for part in parts]
        return [list(line) for line in zip(*padded, strict=True)]

    def _widths(self, narrow: bool) -> list[int]:
        lines: list[Sequence[str | Text]] = [*self._headings(narrow), *(row.cells for row in self._rows)]
        return [
            max(cell_len(_text(line[place]).plain) for line in lines) for place in range(len(self._columns))
        ]

    def _width(self, *, gap: int, narrow: bool) -> int:
        return sum(self._widths(narrow)) + gap * (len(self._columns) - 1)

    def _lines(self, row: Row, widths: Sequence[int], gap: int, width: int, beside: bool) -> Iterator[Text]:
        line = self._joined([_text(cell) for cell in row.cells], widths, gap)
        note = _text(row.note)
        used = sum(widths) + gap * (len(widths) - 1)
        wrapped: list[Text] = []
        if note.plain:
            room = width - used - gap if beside else width - len(_INDENT)
            wrapped = [part for piece in note.split("\n") for part in _wrapped(piece, max(room, 1))]
        if beside and wrapped:
            line.append(" " * (used + gap - cell_len(line.plain)))
            line.append_text(wrapped.pop(0))
            indent = " " * (used + gap)
        else:
            indent = _INDENT
        for text in (line, *(Text(indent).append_text(part) for part in wrapped)):
            text.stylize(row.style)
            yield _cut(text)

    def _joined(self, cells: Sequence[Text], widths: Sequence[int], gap: int) -> Text:
        line = Text()
        for place, (cell, width, column) in enumerate(zip(cells, widths, self._columns, strict=True)):
            padding = " " * (width - cell_len(cell.plain))
            if place:
                line.append(" " * gap)
            if column.right:
                line.append(padding)
            line.append_text(cell)
            if not column.right and place < len(widths) - 1:
                line.append(padding)
        line.rstrip()
        return line


def _text(value: str | Text) -> Text:
    return value if isinstance(value, Text) else Text(value)


def _cut(line: Text) -> Text:
    """A line that never wraps: only a window narrower than `needed` cuts it, and shows that it did."""
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _wrapped(text: Text, width: int) -> list[Text]:
    if cell_len(text.plain) <= width:
        return [text]
    lines = text.wrap(Console(width=width), width)
    for line in lines:
        line.rstrip()
    return list(lines)
