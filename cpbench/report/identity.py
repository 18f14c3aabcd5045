"""Who a record is: the setting it answers for, the identity of its series, and both in words.

A part of the identity that is the same everywhere is said once, in the subtitle; one that varies is
in every label.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cpbench.case import STACKS, Mode, Stack
from cpbench.machine import Machine
from cpbench.model_config import ModelConfig
from cpbench.record import Record
from cpbench.report.load import Entry
from cpbench.report.palette import MODE_WORD
from cpbench.units import GIB, format_bytes

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
    """What makes two numbers of a panel comparable point by point; they share a series if all is equal."""

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


def stack_words(stack: Stack) -> str:
    """Name a stack by its preset, else by what it does."""
    for name, preset in STACKS.items():
        if stack == preset:
            return f"stack {name}"
    tiled = [part for part in ("mlp", "norm", "loss") if getattr(stack, f"tile_{part}")]
    words = [f"checkpointing {stack.checkpoint}", f"offload {stack.offload}"]
    words += [f"tiled {'+'.join(tiled)}"] if tiled else []
    words += ["optimizer offloaded"] if stack.optimizer_offload else []
    words += [f"attention of {stack.save_attention} blocks saved"] if stack.save_attention else []
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
        # The system's versions change without the machine becoming another; total memory varies by some MiB.
        memory = tuple((gpu.name, round(gpu.memory_bytes / GIB)) for gpu in machine.gpus)
        facts = (machine.cpu, machine.cpu_count, round(machine.host_memory_bytes / GIB), memory)
        alike = groups[machine.name]
        if facts not in alike:
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
        profile = record.hardware or "an unnamed machine profile"
        host = record.host_memory_bytes
        return profile if host is None else f"{profile} with {format_bytes(host)} of host memory"
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


def _known(identities: Iterable[Identity], name: str) -> set[object]:
    return {value for identity in identities if (value := getattr(identity, name)) is not None}


def varying_parts(identities: Sequence[Identity]) -> set[str]:
    """Return the names of the common parts that every label must say."""
    here: dict[tuple[str, str], list[Identity]] = defaultdict(list)
    for identity in identities:
        here[identity.mode, identity.place].append(identity)
    varied = {name for name in _COMMON_PARTS if len(_known(identities, name)) > 1}
    varied -= {n for n in _FOLLOWS_PLACE if all(len(_known(group, n)) < 2 for group in here.values())}
    # Where each mode has one place, the word of the mode is enough: the subtitle says where.
    if "place" in varied and len(here) == len({mode for mode, _ in here}):
        varied.remove("place")
    if "place" in varied:
        varied.discard("mode")  # the words for the place begin with the mode
    return varied


def setting_of(record: Record) -> Setting:
    """Return the setting of a record."""
    return Setting(
        model=record.model,
        architecture=record.architecture,
        dtype=record.dtype,
        stack=record.stack,
        batch_size=record.batch_size,
    )


def panel_titles(settings: Sequence[Setting]) -> dict[Setting, str]:
    """Return what tells each setting from the others; nothing where there is one."""
    if len(settings) < 2:
        return dict.fromkeys(settings, "")
    varying = [name for name in settings[0].words if len({setting.words[name] for setting in settings}) > 1]
    return {s: ", ".join(s.words[name] for name in varying) or s.words["model"] for s in settings}


def subtitle(settings: Sequence[Setting], identities: Sequence[Identity]) -> str:
    """Return what holds for every series, then the modes and places, which the legend tells apart."""
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


def series_label(identity: Identity, alike: Sequence[Identity], varied: set[str]) -> str:
    """Return the method with all parts that tell its series from others of the report.

    Args:
        identity: the series to name.
        alike: every series of the same method in its panel, itself included.
        varied: the common parts to say, from `varying_parts`.
    """
    words = []
    for key, value in identity.options:
        if len({dict(other.options).get(key) for other in alike}) > 1:
            words.append(f"{key} {json.loads(value)}")
    for name, letter in (("ulysses_degree", "ulysses"), ("ring_degree", "ring")):
        # The degrees of methods without a choice follow from the number of ranks, which is in the label.
        values = {(other.world_size, getattr(other, name)) for other in alike}
        if len(values) > len({other.world_size for other in alike}):
            words.append(f"{letter} degree {getattr(identity, name) or '?'}")
    words += [say(identity) for name, say in _COMMON_PARTS.items() if name in varied]
    unique = list(dict.fromkeys(word for word in words if word))
    method = identity.method or "(unnamed)"
    return f"{method} ({', '.join(unique)})" if unique else method
