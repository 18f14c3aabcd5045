"""The page's first lines: what kind of numbers these are, and what they say at the longest length.

A finding compares only series of one mode, one place and one number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cpbench.record import Record
from cpbench.report.identity import format_ranks, mode_words
from cpbench.report.palette import MODE_WORD
from cpbench.report.series import Overview, Panel, Series, point_at
from cpbench.units import format_bytes, format_length, format_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One number that answers a question."""

    question: str
    answer: str
    details: str


def introduction(overview: Overview) -> tuple[str, ...]:
    """Return the paragraphs on what a reader looks at: the modes in words, and what they do not tell."""
    identities = [series.identity for panel in overview.panels for series in panel.series]
    modes = sorted({identity.mode for identity in identities}, reverse=True)
    places = sorted({mode_words(identity) for identity in identities})
    text = [
        "This page compares context-parallel training methods on one shared stack: model, sharding, "
        "checkpointing, optimizer, data and seed are equal, and only the attention method differs. "
        f"Its numbers are {_join(places)}. " + " ".join(_MODE_TEXT[mode] for mode in modes)
    ]
    if any(point.record.mode == "measure" and point.record.device == "cpu" for point in overview.points):
        text.append(
            "Ranks that ran on CPU are processes of one machine that share its processors: their memory is "
            "exact (the CPU allocator's own events) and their loss real, but their times say little about "
            "GPUs."
        )
    worlds = {identity.world_size for identity in identities}
    if 1 in worlds and len(worlds) > 1:
        text.append(
            "A series of 1 rank holds the whole sequence and all parameters, so its memory per rank is "
            "naturally larger than that of the series that divide both over several ranks: it is the "
            "reference for the loss, not a competitor."
        )
    return tuple(text)


def findings(overview: Overview) -> tuple[Finding, ...]:
    """Return the count of cases, and the best method of the fullest panel at its longest shared length."""
    outcomes = Counter(point.outcome.name for point in overview.points)
    done = sum(point.plotted for point in overview.points)
    others = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()) if name != "ok")
    found = [
        Finding(
            question="Cases with a result",
            answer=f"{done} of {len(overview.points)}",
            details=others or "every case finished",
        )
    ]
    panel = max(overview.panels, key=lambda p: sum(len(series.plotted) for series in p.series))
    for question, name, show, best in _QUESTIONS:
        finding = _best(panel, question, name, show, best)
        if finding:
            found.append(finding)
    return tuple(found)


_MODE_TEXT = {
    "measure": "Measured: every rank was a real process; memory comes from its allocator, time from its clock.",
    "emulate": "Emulated: one rank ran on one device with all its bytes; its memory and compute time are "
    "measured, communication is modelled, and its loss means nothing.",
    "estimate": "Estimated: nothing was run; memory is counted over the tensors of the step, time modelled.",
}

_QUESTIONS: tuple[
    tuple[str, str, Callable[[float | None], str], Callable[..., tuple[float, Series]]], ...
] = (
    ("Least peak memory", "peak_allocated_bytes", format_bytes, min),
    ("Highest throughput", "tokens_per_second_per_gpu", lambda v: f"{format_rate(v)} tokens/s/rank", max),
    ("Least attention memory", "attention_intermediate_peak_bytes", format_bytes, min),
)


def _best(
    panel: Panel,
    question: str,
    name: str,
    show: Callable[[float | None], str],
    best: Callable[..., tuple[float, Series]],
) -> Finding | None:
    """The winner of the largest group of comparable series, at the longest length that two of them have."""
    groups: dict[tuple[object, ...], list[Series]] = {}
    for series in panel.series:
        identity = series.identity
        groups.setdefault((identity.mode, identity.place, identity.world_size, identity.run), []).append(
            series
        )
    group = max(groups.values(), key=lambda g: (len(g), sum(len(s.plotted) for s in g)))
    lengths = Counter(
        p.record.seq_len for s in group for p in s.plotted if _value(p.record, name) is not None
    )
    shared = [length for length, count in lengths.items() if count > 1]
    if not shared:
        return None
    length = max(shared)
    values = [
        (value, series)
        for series in group
        if any(p.record.seq_len == length for p in series.plotted)
        and (value := _value(point_at(series, length).record, name)) is not None
    ]
    value, winner = best(values, key=lambda pair: pair[0])
    identity = winner.identity
    details = (
        f"{show(value)} at {format_length(length)}; {len(values)} series compared, "
        f"{format_ranks(identity.world_size)}, {MODE_WORD[identity.mode]}"
    )
    where = f" ({panel.title})" if panel.title else ""
    alone = sum(series.identity.method == identity.method for series in group) == 1
    return Finding(
        question=question + where, answer=identity.method if alone else winner.label, details=details
    )


def _value(record: Record, name: str) -> float | None:
    value: float | None = getattr(record, name)
    return value


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
