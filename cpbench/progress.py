"""What a sweep shows while it works: a live table in a terminal, plain lines in a pipe or a CI log."""

from __future__ import annotations

import textwrap
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from cpbench.case import Case
from cpbench.errors import without_name
from cpbench.expand import Plan
from cpbench.launch import Progress
from cpbench.record import Record
from cpbench.summary import RESULTS, STATUS_STYLE, CaseNames, Cells, case_table, record_cells
from cpbench.text_table import TextTable
from cpbench.units import format_bytes, format_rate, format_seconds


class Display(Protocol):
    """Shows a sweep; entered before the first case and left after the last."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def note(self, text: str) -> None:
        """Show a sentence."""

    def started(self, case: Case) -> None:
        """A case's processes are about to be started."""

    def waiting(self, case: Case, progress: Progress | None, elapsed_seconds: float) -> None:
        """A running case is still running; called about ten times a second."""

    def finished(self, record: Record, *, kept: bool = False) -> None:
        """A case has its record; `kept` if an earlier sweep made it."""


def make_display(plan: Plan, console: Console) -> Display:
    """Return a live display for a terminal, plain lines for anything else."""
    return LiveDisplay(plan, console) if console.is_terminal else PlainDisplay(plan, console)


def headline(plan: Plan) -> str:
    """Return what is going to run and in which mode."""
    unsupported = sum(1 for item in plan.cases if item.unsupported)
    skipped = f" ({unsupported} unsupported)" if unsupported else ""
    choice = plan.choice
    return (
        f"{plan.scenario.name}: {len(plan.cases)} case{'s' * (len(plan.cases) != 1)}{skipped}, "
        f"mode {choice.mode} on {choice.device} ({choice.reason})"
    )


class PlainDisplay:
    """One line when a case starts and one when it ends."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._console = console
        self._plan = plan
        self._total = len(plan.cases)
        self._position = {item.case.case_id: k for k, item in enumerate(plan.cases, start=1)}
        self._names = CaseNames([item.case for item in plan.cases])

    def __enter__(self) -> PlainDisplay:
        self.note(headline(self._plan))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def note(self, text: str) -> None:
        """Print a line as it is: no markup, no wrapping, so that logs can be searched."""
        self._console.print(Text(text), soft_wrap=True)

    def started(self, case: Case) -> None:
        """Print the case."""
        self.note(f"[{self._position[case.case_id]}/{self._total}] {self._names.title(case)}  started")

    def waiting(self, case: Case, progress: Progress | None, elapsed_seconds: float) -> None:
        """Print nothing: a log needs no animation."""

    def finished(self, record: Record, *, kept: bool = False) -> None:
        """Print the outcome and its numbers, or the first line of the reason."""
        place = f"[{self._position[record.case_id]}/{self._total}]"
        self.note(f"{place} {one_line(record, self._names.title(record), kept=kept)}")


def one_line(record: Record, title: str, *, kept: bool = False) -> str:
    """Return a record as one line of text that begins with the title of its case."""
    parts = [title, record.status]
    if record.status == "ok":
        parts.append(f"peak {format_bytes(record.peak_allocated_bytes)}")
        if record.step_seconds is not None:
            parts.append(f"step {format_seconds(record.step_seconds)}")
            parts.append(f"{format_rate(record.tokens_per_second_per_gpu)} tokens/s/rank")
    elif record.reason:
        parts.append(without_name(record.reason, record.method).splitlines()[0])
    parts.append("(kept)" if kept else f"({format_seconds(record.duration_seconds)})")
    return "  ".join(parts)


_MOST_RUNNING = 4
"""Lines that running cases may take."""


@dataclass(slots=True)
class _Running:
    """A case that runs now."""

    title: str
    """Of the case."""
    since: float
    """By the monotonic clock."""
    progress: Progress | None = None

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.since

    def line(self) -> str:
        """The case, what it does, and for how long."""
        told = self.progress
        phase = "starting processes" if told is None else f"{told.phase} {told.done}/{told.total}"
        return f"{self.title}  {phase}  {format_seconds(max(1.0, round(self.seconds)))}"


class LiveDisplay:
    """A table of the cases, what runs now, and how long it may still take."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._console = console
        self._plan = plan
        self._records: dict[str, Record] = {}
        self._kept: set[str] = set()
        self._running: dict[str, _Running] = {}
        self._names = CaseNames([item.case for item in plan.cases])
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveDisplay:
        self.note(headline(self._plan))
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """Print a sentence above the table."""
        self._console.print(Text(text))

    def started(self, case: Case) -> None:
        """Mark the case as running."""
        self._running[case.case_id] = _Running(self._names.title(case), time.monotonic())

    def waiting(self, case: Case, progress: Progress | None, elapsed_seconds: float) -> None:
        """Remember the progress for the next refresh."""
        self._running[case.case_id].progress = progress

    def finished(self, record: Record, *, kept: bool = False) -> None:
        """Put the record into the table."""
        self._running.pop(record.case_id, None)
        self._records[record.case_id] = record
        if kept:
            self._kept.add(record.case_id)

    def _render(self) -> RenderableType:
        first, last = self._window()
        lines: list[RenderableType] = [self._table(first, last)]
        hidden = len(self._plan.cases) - (last - first)
        if hidden:
            lines.append(Text(f"... {hidden} more not shown", style="dim"))
        lines += [Text(line, overflow="ellipsis", no_wrap=True) for line in self._now()]
        return Group(*lines, Text(self._summary()))

    def _table(self, first: int, last: int) -> TextTable:
        items = self._plan.cases[first:last]
        unsupported = {item.case.case_id for item in items if item.unsupported}

        def cells(case: Case | Record) -> Cells:
            record = self._records.get(case.case_id)
            if record is not None:
                return [Text(record.status, style=STATUS_STYLE[record.status]), *record_cells(record)]
            if case.case_id in self._running:
                return [Text("running", style="bold cyan"), "", "", ""]
            waiting = "unsupported" if case.case_id in unsupported else "waiting"
            return [Text(waiting, style="dim"), "", "", ""]

        width = self._console.size.width
        return case_table([item.case for item in items], cells, RESULTS, names=self._names, width=width)

    def _window(self) -> tuple[int, int]:
        """The slice of cases that fits the terminal, with the next case to end in it."""
        total = len(self._plan.cases)
        headings, *heights = self._table(0, total).heights(self._console.size.width)
        room = self._console.size.height - 4 - headings - len(self._now())
        middle = min(len(self._records), total - 1)
        first, last, room = middle, middle + 1, room - heights[middle]
        while True:  # in turn above and below, as far as lines are left
            above = first > 0 and heights[first - 1] <= room
            below = last < total and heights[last] <= room
            if above and (not below or middle - first < last - 1 - middle):
                first -= 1
                room -= heights[first]
            elif below:
                room -= heights[last]
                last += 1
            else:
                return first, last

    def _now(self) -> list[str]:
        """A line for each running case, as far as there is room."""
        if not self._running:
            return ["now: preparing the next case"]
        running = list(self._running.values())
        width = self._console.size.width
        lines = [
            part
            for one in running[:_MOST_RUNNING]
            for part in textwrap.wrap(f"now: {one.line()}", width, subsequent_indent="     ")
        ]
        more = len(running) - _MOST_RUNNING
        return [*lines, f"     and {more} more"] if more > 0 else lines

    def _summary(self) -> str:
        done, total = len(self._records), len(self._plan.cases)
        bad = sum(1 for record in self._records.values() if record.status not in ("ok", "unsupported"))
        words = [f"{done}/{total} done", f"mode {self._plan.choice.mode} on {self._plan.choice.device}"]
        if bad:
            words.insert(1, f"{bad} not ok")
        remaining = self._remaining_seconds()
        if remaining is not None:
            words.append(f"about {format_seconds(remaining)} left")
        return ", ".join(words)

    def _remaining_seconds(self) -> float | None:
        """The mean duration of the cases launched so far, times the cases to come, as many at a time as now."""
        took = [
            record.duration_seconds
            for case_id, record in self._records.items()
            if record.duration_seconds > 0 and case_id not in self._kept
        ]
        if not took:
            return None
        todo = [
            item
            for item in self._plan.cases
            if not item.unsupported and item.case.case_id not in self._records
        ]
        mean = sum(took) / len(took)
        spent = sum(min(one.seconds, mean) for one in self._running.values())
        at_a_time = max(1, len(self._running))
        return max(1.0, round((len(todo) * mean - spent) / at_a_time)) if todo else None
