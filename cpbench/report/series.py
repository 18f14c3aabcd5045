"""Entries to panels of labelled series: what may be joined by a line, and what each line must be called.

A *panel* holds what answers one question: one model, dtype, stack and batch size.  Within it a *series* joins
the lengths of one method under one `Identity`: mode, machine, number of ranks, options, kernel and more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from cpbench.record import Record
from cpbench.report.checks import LossCheck, check_losses
from cpbench.report.identity import (
    Identity,
    Places,
    Setting,
    identity_of,
    machine_names,
    panel_titles,
    series_label,
    setting_of,
    subtitle,
    varying_parts,
)
from cpbench.report.load import Entry
from cpbench.report.palette import LOSS_DIFFERS, STATUS_WORDS, StatusWords, method_rank, method_style


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One entry in its series."""

    entry: Entry
    loss: LossCheck

    @property
    def record(self) -> Record:
        """The entry's record."""
        return self.entry.record

    @property
    def plotted(self) -> bool:
        """Its numbers may be shown in a picture."""
        return self.record.status == "ok" and not self.loss.differs

    @property
    def outcome(self) -> StatusWords:
        """Why it is not plotted, or that it finished."""
        wrong_loss = self.record.status == "ok" and self.loss.differs
        return LOSS_DIFFERS if wrong_loss else STATUS_WORDS[self.record.status]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of a picture."""

    identity: Identity
    label: str
    color: str
    marker: str
    points: tuple[Point, ...]
    """By length; also those that are not plotted."""

    @property
    def plotted(self) -> tuple[Point, ...]:
        """The points with numbers."""
        return tuple(point for point in self.points if point.plotted)

    @property
    def missing(self) -> tuple[Point, ...]:
        """The points that are only marked."""
        return tuple(point for point in self.points if not point.plotted)


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One facet of every picture."""

    setting: Setting
    title: str
    """The parts of the setting that vary over the panels; empty when there is one panel."""
    series: tuple[Series, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every length of the panel, also of cases without numbers."""
        return tuple(sorted({point.record.seq_len for series in self.series for point in series.points}))

    @property
    def words_first(self) -> bool:
        """Whether a case without numbers is at the shortest length: its words need room to the left."""
        shortest = self.lengths[0]
        return any(p.record.seq_len == shortest for series in self.series for p in series.missing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """What the pictures and the page are drawn from."""

    panels: tuple[Panel, ...]
    subtitle: str
    """All that holds for every series, so that each picture can stand alone."""
    points: tuple[Point, ...]
    """Every entry in the order of the results table."""
    replaced: int
    """Copies of a case that gave way to the one started last."""


def arrange(entries: Sequence[Entry]) -> Overview:
    """Group entries to panels and series and name them."""
    places = machine_names(entry.record.machine for entry in entries)
    checks = check_losses(entries)
    points = [Point(entry=entry, loss=check) for entry, check in zip(entries, checks, strict=True)]
    grouped = _group(points, places, by_run=False)
    if any(_has_doubles(series) for series in grouped.values()):
        grouped = _group(points, places, by_run=True)
    grouped = {key: _latest(found) for key, found in grouped.items()}
    settings = sorted({setting for setting, _ in grouped}, key=_setting_order)
    identities = [identity for _, identity in grouped]
    varied = varying_parts(identities)
    titles = panel_titles(settings)
    panels = []
    for setting in settings:
        members = {identity: found for (where, identity), found in grouped.items() if where == setting}
        panels.append(Panel(setting=setting, title=titles[setting], series=_series(members, varied)))
    ordered = [point for panel in panels for series in panel.series for point in series.points]
    return Overview(
        panels=tuple(panels),
        subtitle=subtitle(settings, identities),
        points=tuple(ordered),
        replaced=len(points) - len(ordered),
    )


def outcome_runs(series: Series, lengths: Sequence[int]) -> list[tuple[Point, str]]:
    """Return the points without numbers, each with the words to write beside it.

    Only the first of neighbouring lengths with one outcome carries words: `OOM x x x`, not `OOM x OOM x OOM
    x`.
    """
    found: list[tuple[Point, str]] = []
    before: tuple[int, str] | None = None
    for point in series.missing:
        position, words = lengths.index(point.record.seq_len), point.outcome.short
        found.append((point, "" if before == (position - 1, words) else words))
        before = (position, words)
    return found


def shared_length(panel: Panel, has_value: Callable[[Record], bool]) -> tuple[int | None, tuple[Series, ...]]:
    """Return the longest length common to most series of a panel, and the series with a value there.

    Series of one rank are shown where they can be, but do not hold the others back.
    """
    having: dict[int, list[Series]] = defaultdict(list)
    for series in panel.series:
        for point in series.plotted:
            if has_value(point.record):
                having[point.record.seq_len].append(series)
    if not having:
        return None, ()
    # One rank alone runs out of memory first; the others are not to be judged at the length where it did.
    many = max(series.identity.world_size for series in panel.series)
    rivals = {n: sum(s.identity.world_size > 1 or many == 1 for s in found) for n, found in having.items()}
    length = max(having, key=lambda seq_len: (rivals[seq_len], seq_len))
    return length, tuple(having[length])


def point_at(series: Series, seq_len: int) -> Point:
    """Return the plotted point of a series at a length that it has."""
    return next(point for point in series.plotted if point.record.seq_len == seq_len)


_FILLED_ON_RESOLUTION = ("ulysses_degree", "ring_degree", "torch", "attention_backend")
"""Parts that a case which did not run may lack."""


_Groups = dict[tuple[Setting, Identity], list[Point]]


def _group(points: Sequence[Point], places: Places, *, by_run: bool) -> _Groups:
    """Finished cases first, then each case without numbers to the series it would have been a point of."""
    groups: _Groups = defaultdict(list)
    for point in sorted(points, key=lambda p: p.record.status != "ok"):
        identity = identity_of(point.entry, places, by_run=by_run)
        setting = setting_of(point.record)
        if point.record.status != "ok":
            kin = [i for s, i in groups if s == setting and _may_belong(identity, i)]
            identity = kin[0] if kin else identity
        groups[setting, identity].append(point)
    return groups


def _may_belong(unfinished: Identity, finished: Identity) -> bool:
    """Whether all that is known of an unfinished case agrees with a series."""
    known = replace(
        unfinished,
        options=finished.options if set(unfinished.options) <= set(finished.options) else unfinished.options,
        **{
            name: getattr(finished, name)
            for name in _FILLED_ON_RESOLUTION
            if getattr(unfinished, name) is None
        },
    )
    return known == finished


def _setting_order(setting: Setting) -> tuple[object, ...]:
    arch = setting.architecture
    return (arch.num_params, setting.model, setting.dtype, setting.batch_size, str(setting.stack), str(arch))


def _has_doubles(points: Sequence[Point]) -> bool:
    return len({(point.entry.run, point.record.seq_len) for point in points}) > len(
        {point.record.seq_len for point in points}
    )


def _latest(points: Sequence[Point]) -> list[Point]:
    """One point a length: copies of a case give way to the one started last."""
    newest = {p.record.seq_len: p for p in sorted(points, key=lambda p: p.record.started)}
    return [newest[length] for length in sorted(newest)]


def _series(members: Mapping[Identity, Sequence[Point]], varied: set[str]) -> tuple[Series, ...]:
    ordered = sorted(members, key=_identity_order)
    variants: dict[str, int] = defaultdict(int)
    result = []
    for identity in ordered:
        color, marker = method_style(identity.method, variants[identity.method])
        variants[identity.method] += 1
        alike = [other for other in ordered if other.method == identity.method]
        label = series_label(identity, alike, varied)
        result.append(
            Series(
                identity=identity, label=label, color=color, marker=marker, points=tuple(members[identity])
            )
        )
    return tuple(result)


def _identity_order(identity: Identity) -> tuple[object, ...]:
    modes = ("measure", "emulate", "estimate")
    return (
        method_rank(identity.method),
        modes.index(identity.mode),
        *(_sortable(getattr(identity, f.name)) for f in fields(identity)),
    )


def _sortable(value: object) -> tuple[int, str]:
    return (value, "") if isinstance(value, int) else (-1, str(value))
