"""Entries to panels of labelled series: what may be joined by a line, and what each line must be called.

A *panel* holds what answers one question: one model, dtype, stack and batch size.  Within it a *series* joins
the lengths of one method under one identity (see `Identity`): mode, machine, number of ranks, options,
kernel, ... A part of the identity that is the same everywhere is said once, in the subtitle; one that varies
is in every label.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from cpbench.case import STACKS, Mode, Stack
from cpbench.machine import Machine
from cpbench.model_config import ModelConfig
from cpbench.record import Record
from cpbench.report.checks import LossCheck, check_losses
from cpbench.report.load import Entry
from cpbench.report.palette import (
    LOSS_DIFFERS,
    MODE_WORD,
    STATUS_WORDS,
    StatusWords,
    method_rank,
    method_style,
)
from cpbench.units import GIB

Places = Mapping[Machine, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all series of a panel share."""

    model: str
    architecture: ModelConfig
    dtype: str
    stack: Stack
    batch_size: int

    @property
    def words(self) -> dict[str, str]:
        """Each part in words, by its name."""
        return {
            "model": f"{self.model} ({format_params(self.architecture.num_params)} parameters)",
            "dtype": self.dtype,
            "stack": stack_words(self.stack),
            "batch": f"batch {self.batch_size}",
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What makes two numbers of a panel comparable point by point; they share a series only if all is equal."""

    method: str
    options: tuple[tuple[str, str], ...]
    world_size: int
    nodes: int
    ulysses_degree: int | None
    ring_degree: int | None
    mode: Mode
    place: str
    """The machine that made the numbers, or the machine profile that they are estimated for."""
    communication: str | None
    """Emulation only: the machine profile whose communication is modelled."""
    torch: str | None
    attention_backend: str | None
    seed: int
    steps: int
    warmup: int
    run: str | None = None
    """Only where two runs hold the same case; None otherwise, so that runs complete one another."""


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
        return (
            LOSS_DIFFERS
            if self.record.status == "ok" and self.loss.differs
            else STATUS_WORDS[self.record.status]
        )


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
    varying = _varying(identities)
    titles = _panel_titles(settings)
    panels = []
    for setting in settings:
        members = {identity: found for (where, identity), found in grouped.items() if where == setting}
        panels.append(Panel(setting=setting, title=titles[setting], series=_series(members, varying)))
    ordered = [point for panel in panels for series in panel.series for point in series.points]
    return Overview(
        panels=tuple(panels),
        subtitle=_subtitle(settings, identities),
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


def stack_words(stack: Stack) -> str:
    """Name a stack by its preset, else by what it does."""
    for name, preset in STACKS.items():
        if stack == preset:
            return f"stack {name}"
    tiled = [part for part in ("mlp", "norm", "loss") if getattr(stack, f"tile_{part}")]
    words = [f"checkpointing {stack.checkpoint}", f"offload {stack.offload}"]
    words += [f"tiled {'+'.join(tiled)}"] if tiled else []
    words += ["optimizer offloaded"] if stack.optimizer_offload else []
    return "stack: " + ", ".join(words)


def format_params(count: int) -> str:
    """Return a number of parameters as people say it, for example `8.03 B`, `3.4 M`."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return str(count)


def mode_words(identity: Identity) -> str:
    """Say how the numbers of a series came to be and where."""
    modelled = f" with the communication of {identity.communication}" if identity.communication else ""
    return place_words(identity) + modelled


def place_words(identity: Identity) -> str:
    """Say the mode and the place, short enough for a label."""
    return f"{MODE_WORD[identity.mode]} {'for' if identity.mode == 'estimate' else 'on'} {identity.place}"


def format_ranks(count: int) -> str:
    """Return `1 rank` or `4 ranks`."""
    return f"{count} rank" if count == 1 else f"{count} ranks"


def machine_names(machines: Iterable[Machine | None]) -> dict[Machine, str]:
    """Name machines so that two that differ never share a name."""
    groups: dict[str, list[tuple[object, ...]]] = defaultdict(list)
    names: dict[Machine, str] = {}
    for machine in machines:
        if machine is None or machine in names:
            continue
        # Versions of the system change without the machine becoming another one; total memory varies by some
        MiB. memory = tuple((gpu.name, round(gpu.memory_bytes / GIB)) for gpu in machine.gpus) facts =
        (machine.cpu, machine.cpu_count, round(machine.host_memory_bytes / GIB), memory) alike =
        groups[machine.name] if facts not in alike:
            alike.append(facts)
        number = alike.index(facts) + 1
        names[machine] = machine.name if number == 1 else f"{machine.name} #{number}"
    return names


def identity_of(entry: Entry, places: Places, *, by_run: bool) -> Identity:
    """Return the identity of an entry's series."""
    record = entry.record
    return Identity(
        method=record.method,
        options=tuple(sorted((key, json.dumps(value)) for key, value in record.options.items())),
        world_size=record.world_size,
        nodes=record.nodes,
        ulysses_degree=record.ulysses_degree,
        ring_degree=record.ring_degree,
        mode=record.mode,
        place=_place(record, places),
        communication=record.hardware if record.mode == "emulate" else None,
        torch=record.torch,
        attention_backend=record.attention_backend,
        seed=record.seed,
        steps=record.steps,
        warmup=record.warmup,
        run=entry.run if by_run else None,
    )


def _place(record: Record, places: Places) -> str:
    if record.mode == "estimate":
        return record.hardware or "an unnamed machine profile"
    machine = places[record.machine] if record.machine else "an unknown machine"
    if record.device == "cpu" and not machine.startswith("cpu"):
        machine += ", CPU processes"
    return machine


_COMMON_PARTS: dict[str, Callable[[Identity], str]] = {
    "world_size": lambda i: format_ranks(i.world_size),
    "nodes": lambda i: f"{i.nodes} node" + ("s" if i.nodes > 1 else ""),
    "mode": lambda i: MODE_WORD[i.mode],
    "place": place_words,
    "communication": lambda i: f"communication of {i.communication}" if i.communication else "",
    "torch": lambda i: f"torch {i.torch}" if i.torch else "",
    "attention_backend": lambda i: i.attention_backend or "",
    "seed": lambda i: f"seed {i.seed}",
    "steps": lambda i: f"{i.steps} steps",
    "warmup": lambda i: f"{i.warmup} warm-up steps",
    "run": lambda i: f"run {i.run}" if i.run else "",
}
"""Parts that a label names when they vary over the report; the method's own parts vary within the method."""

_FOLLOWS_PLACE = ("torch", "attention_backend")
"""Parts that differ between machines as a matter of course: named only when they differ on one machine."""

_FILLED_ON_RESOLUTION = ("ulysses_degree", "ring_degree", "torch", "attention_backend")
"""Parts that a case which did not run may lack."""


def _known(identities: Iterable[Identity], name: str) -> set[object]:
    return {value for identity in identities if (value := getattr(identity, name)) is not None}


def _varying(identities: Sequence[Identity]) -> set[str]:
    """The common parts that every label must name."""
    here: dict[tuple[str, str], list[Identity]] = defaultdict(list)
    for identity in identities:
        here[identity.mode, identity.place].append(identity)
    varying = {name for name in _COMMON_PARTS if len(_known(identities, name)) > 1}
    varying -= {n for n in _FOLLOWS_PLACE if all(len(_known(group, n)) < 2 for group in here.values())}
    # Where each mode has one place, the word of the mode is enough: the subtitle says where.
    if "place" in varying and len(here) == len({mode for mode, _ in here}):
        varying.remove("place")
    if "place" in varying:
        varying.discard("mode")  # the words for the place begin with the mode
    return varying


_Groups = dict[tuple[Setting, Identity], list[Point]]


def _group(points: Sequence[Point], places: Places, *, by_run: bool) -> _Groups:
    """Finished cases first, then each case without numbers to the series that it would have been a point of."""
    groups: _Groups = defaultdict(list)
    for point in sorted(points, key=lambda p: p.record.status != "ok"):
        identity = identity_of(point.entry, places, by_run=by_run)
        setting = _setting_of(point.record)
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


def _setting_of(record: Record) -> Setting:
    return Setting(
        model=record.model,
        architecture=record.architecture,
        dtype=record.dtype,
        stack=record.stack,
        batch_size=record.batch_size,
    )


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


def _panel_titles(settings: Sequence[Setting]) -> dict[Setting, str]:
    if len(settings) < 2:
        return dict.fromkeys(settings, "")
    varying = [name for name in settings[0].words if len({setting.words[name] for setting in settings}) > 1]
    return {s: ", ".join(s.words[name] for name in varying) or s.words["model"] for s in settings}


def _subtitle(settings: Sequence[Setting], identities: Sequence[Identity]) -> str:
    """What holds for every series, then what differs and is therefore in the legend."""
    words = []
    for name in settings[0].words if settings else ():
        values = {setting.words[name] for setting in settings}
        if len(values) == 1:
            words.append(values.pop())
    worlds = sorted(_known(identities, "world_size"), key=str)
    if len(worlds) == 1:
        words.append(format_ranks(identities[0].world_size))
    modes = sorted({mode_words(identity) for identity in identities}, reverse=True)
    words.append(modes[0] if len(modes) == 1 else "by series: " + ", ".join(modes[:-1]) + " or " + modes[-1])
    return " \u00b7 ".join(words)


def _series(members: Mapping[Identity, Sequence[Point]], varying: set[str]) -> tuple[Series, ...]:
    ordered = sorted(members, key=_identity_order)
    variants: dict[str, int] = defaultdict(int)
    result = []
    for identity in ordered:
        color, marker = method_style(identity.method, variants[identity.method])
        variants[identity.method] += 1
        alike = [other for other in ordered if other.method == identity.method]
        label = _label(identity, alike, varying)
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


def _label(identity: Identity, alike: Sequence[Identity], varying: set[str]) -> str:
    """The method and all parts that tell its series from others of the report."""
    words = []
    for key, value in identity.options:
        if len({dict(other.options).get(key) for other in alike}) > 1:
            words.append(f"{key} {json.loads(value)}")
    for name, letter in (("ulysses_degree", "ulysses"), ("ring_degree", "ring")):
        # The degrees of methods without a choice follow from the number of ranks, which is in the label.
        values = {(other.world_size, getattr(other, name)) for other in alike}
        if len(values) > len({other.world_size for other in alike}):
            words.append(f"{letter} degree {getattr(identity, name) or '?'}")
    words += [say(identity) for name, say in _COMMON_PARTS.items() if name in varying]
    unique = list(dict.fromkeys(word for word in words if word))
    method = identity.method or "(unnamed)"
    return f"{method} ({', '.join(unique)})" if unique else method
