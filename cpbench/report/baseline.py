"""The cases of a report against the same cases of a baseline: rows of cells, and what has no counterpart.

A counterpart has the same case id, else the same resolved case with any number of steps and warm-up steps.
Whatever else differs between the two (machine, torch, source, commit ...) is said in the row; between modes no
difference is computed at all.  Pure functions; escaping is the business of whoever shows the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cpbench.case import Case, Stack
from cpbench.record import Record
from cpbench.report.columns import MISSING, Cell
from cpbench.report.identity import Places, format_ranks, machine_names, mode_words
from cpbench.report.palette import MODE_WORD
from cpbench.report.series import Overview, Panel, Point, Series
from cpbench.report.tables import case_title
from cpbench.units import format_bytes, format_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Heading:
    """A column of the comparison."""

    title: str
    about: str
    numeric: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What the section "Against the baseline" shows."""

    name: str
    """Of the baseline."""
    lead: tuple[str, ...]
    """Sentences: how many cases have a counterpart, and between what the differences lie."""
    flagged: tuple[str, ...]
    """Cases that are ok in the baseline and no longer."""
    columns: tuple[Heading, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """One a case that has a counterpart, in the order of the results table."""
    only_here: tuple[str, ...]
    """Cases of the runs without a counterpart, one text a series."""
    only_there: tuple[str, ...]
    """Cases of the baseline without a counterpart, one text a series."""


@dataclass(frozen=True, slots=True)
class _Pair:
    title: str
    now: Point
    before: Point

    @property
    def no_longer_ok(self) -> bool:
        return self.before.plotted and not self.now.plotted

    def values(self, name: str) -> tuple[float | None, float | None]:
        """A quantity before and now."""
        return getattr(self.before.record, name), getattr(self.now.record, name)

    def relative(self, name: str) -> float | None:
        """Difference over the baseline's value; None where it has no meaning."""
        before, now = self.values(name)
        if self.before.record.mode != self.now.record.mode or before is None or now is None or before <= 0:
            return None
        found = (now - before) / before
        return found if math.isfinite(found) else None


def compare(overview: Overview, baseline: Overview, name: str) -> Comparison:
    """Hold the cases of a report against those of a baseline.

    Args:
        overview: the runs of the report.
        baseline: the baseline's records.
        name: of the baseline, for people.
    """
    pairs: list[_Pair] = []
    alone: set[int] = set()
    used: set[int] = set()
    for panel in overview.panels:
        for series in panel.series:
            for point in series.points:
                found = counterpart(point, baseline.points)
                if found is None:
                    alone.add(id(point))
                else:
                    used.add(id(found))
                    pairs.append(_Pair(case_title([point], series, panel), point, found))
    unused = {id(point) for point in baseline.points} - used
    places = machine_names(point.record.machine for point in (*baseline.points, *overview.points))
    several = len({point.entry.run for point in overview.points}) > 1
    return Comparison(
        name=name,
        lead=_lead(pairs, overview, several=several),
        flagged=tuple(
            f"{pair.title}: {pair.before.outcome.name} in the baseline, now {pair.now.outcome.name}"
            for pair in pairs
            if pair.no_longer_ok
        ),
        columns=_columns(several=several),
        rows=tuple(_row(pair, places, several=several) for pair in pairs),
        only_here=_titles(overview, alone),
        only_there=_titles(baseline, unused),
    )


def counterpart(point: Point, candidates: Sequence[Point]) -> Point | None:
    """Return the same case among others, or None.

    Of several, the one from the same machine is taken, then the one started last.
    """
    record = point.record
    same = [other for other in candidates if other.record.case_id == record.case_id]
    same = same or [other for other in candidates if _question(other.record) == _question(record)]
    if same:
        return max(same, key=lambda p: (p.record.machine == record.machine, p.record.started))
    # A case that did not run may lack what resolution fills in; more than one fit would be a guess.
    near = [other for other in candidates if _may_be(record, other.record)]
    return near[0] if len(near) == 1 else None


_FILLED_ON_RESOLUTION = ("options", "ulysses_degree", "ring_degree")
# The record names the kernel that ran, not the one that was asked for; `differences` compares it.
_QUESTION = tuple(
    name
    for name in (*Case.model_fields, *Stack.model_fields)
    if name not in (*_FILLED_ON_RESOLUTION, "stack", "steps", "warmup", "attention_backend")
)


def _question(record: Record) -> tuple[object, ...]:
    return tuple(getattr(record, name) for name in (*_QUESTION, *_FILLED_ON_RESOLUTION))


def _may_be(one: Record, other: Record) -> bool:
    """Whether all that is known of a case without numbers agrees with another case."""
    if one.status == "ok" and other.status == "ok":
        return False
    if any(getattr(one, name) != getattr(other, name) for name in _QUESTION):
        return False
    degrees = ((getattr(one, name), getattr(other, name)) for name in ("ulysses_degree", "ring_degree"))
    if any(None not in pair and pair[0] != pair[1] for pair in degrees):
        return False
    less, more = (one, other) if one.status != "ok" else (other, one)
    return less.options.items() <= more.options.items() or (
        more.status != "ok" and more.options.items() <= less.options.items()
    )


def differences(before: Record, now: Record, places: Places) -> tuple[str, ...]:
    """Say what differs between the circumstances of two records of one case; empty when nothing does.

    Args:
        before: of the baseline.
        now: of the report.
        places: names of the machines of both.
    """
    facts: tuple[tuple[str, str | None, str | None], ...] = (
        ("mode", MODE_WORD[before.mode], MODE_WORD[now.mode]),
        ("machine", _machine(before, places), _machine(now, places)),
        ("torch", before.torch, now.torch),
        ("kernel", before.attention_backend, now.attention_backend),
        ("steps", _steps(before), _steps(now)),
        ("method source", before.method_source_hash, now.method_source_hash),
        ("commit", before.git_commit, now.git_commit),
    )
    return tuple(f"{what}: {a or 'unknown'}, now {b or 'unknown'}" for what, a, b in facts if a != b)


def _machine(record: Record, places: Places) -> str | None:
    return places[record.machine] if record.machine else None


def _steps(record: Record) -> str:
    return f"{record.steps} after {record.warmup}"


def _columns(*, several: bool) -> tuple[Heading, ...]:
    relative = "Difference over the baseline's value"
    run = (Heading(title="Run", about="Run folder", numeric=False),) if several else ()
    return (
        Heading(title="Case", about="Series and length", numeric=False),
        *run,
        Heading(title="Status before", about="Outcome in the baseline", numeric=False),
        Heading(title="Status", about="Outcome in the run", numeric=False),
        Heading(title="Peak before", about="Peak allocated bytes in the baseline, largest over ranks"),
        Heading(title="Peak", about="Peak allocated bytes in the run, largest over ranks"),
        Heading(title="Peak %", about=relative),
        Heading(title="Peak difference", about="Bytes in the run minus bytes in the baseline"),
        Heading(title="Step before", about="Step time in the baseline, median of the slowest rank"),
        Heading(title="Step", about="Step time in the run, median of the slowest rank"),
        Heading(title="Step %", about=relative),
        Heading(
            title="Differs in",
            about="Mode, machine, torch, kernel, steps, source of the method and commit were compared",
            numeric=False,
        ),
    )


def _row(pair: _Pair, places: Places, *, several: bool) -> tuple[Cell, ...]:
    peaks, steps = pair.values("peak_allocated_bytes"), pair.values("step_seconds")
    before, now = pair.before.outcome.name, pair.now.outcome.name
    status = Cell(f"{now}, was {before}", now, "bad") if pair.no_longer_ok else Cell(now, now)
    run = (Cell(pair.now.entry.run, pair.now.entry.run),) if several else ()
    differing = "; ".join(differences(pair.before.record, pair.now.record, places)) or "nothing"
    return (
        Cell(pair.title, pair.title),
        *run,
        Cell(before, before),
        status,
        *(Cell(format_bytes(peak), peak) for peak in peaks),
        _percent(pair.relative("peak_allocated_bytes")),
        _byte_difference(pair),
        *(Cell(format_seconds(seconds), seconds) for seconds in steps),
        _percent(pair.relative("step_seconds")),
        Cell(differing, differing),
    )


def _percent(value: float | None) -> Cell:
    return Cell(MISSING if value is None else f"{value:+.2%}", value)


def _byte_difference(pair: _Pair) -> Cell:
    before, now = pair.values("peak_allocated_bytes")
    if before is None or now is None or pair.before.record.mode != pair.now.record.mode:
        return Cell(MISSING, None)
    return Cell(("+" if now > before else "") + format_bytes(now - before), now - before)


def _lead(pairs: Sequence[_Pair], overview: Overview, *, several: bool) -> tuple[str, ...]:
    whose = "these runs" if several else "this run"
    if not pairs:
        return (f"No case of {whose} has a counterpart in the baseline, so nothing is compared.",)
    sentences = [f"{len(pairs)} of {len(overview.points)} cases of {whose} have a counterpart."]
    for what, name in (("Peak allocated", "peak_allocated_bytes"), ("Step time", "step_seconds")):
        found = [(value, pair.title) for pair in pairs if (value := pair.relative(name)) is not None]
        if found:
            (low, least), (high, most) = min(found), max(found)
            sentences.append(f"{what} differs by {low:+.2%} ({least}) to {high:+.2%} ({most}).")
    modes = sum(pair.before.record.mode != pair.now.record.mode for pair in pairs)
    if modes:
        sentences.append(
            f"{modes} of {len(pairs)} have another mode there, so no difference is given for them."
        )
    machines = machine_names(p.record.machine for pair in pairs for p in (pair.before, pair.now))
    moved = sum(
        _machine(pair.before.record, machines) != _machine(pair.now.record, machines) for pair in pairs
    )
    if moved:
        sentences.append(f"{moved} of {len(pairs)} were run on another machine there; their rows say so.")
    return tuple(sentences)


def _titles(overview: Overview, chosen: Iterable[int]) -> tuple[str, ...]:
    """Name points, given by `id`, series by series, so that each text stands without the rest of its report."""
    wanted = set(chosen)
    result = []
    for panel in overview.panels:
        for series in panel.series:
            points = [point for point in series.points if id(point) in wanted]
            if points:
                result.append(_full_title(points, series, panel))
    return tuple(result)


def _full_title(points: Sequence[Point], series: Series, panel: Panel) -> str:
    # The titles of panels say only what varies in one report; here two reports meet.
    identity = series.identity
    ranks, seed = format_ranks(identity.world_size), f"seed {identity.seed}"
    words = ", ".join((*panel.setting.words.values(), ranks, seed, mode_words(identity)))
    outcomes = ", ".join(dict.fromkeys(point.outcome.name for point in points))
    return f"{case_title(points, series, panel)} ({words}): {outcomes}"
