"""The cases of a report beside what is published of the same case: rows of cells, and published.csv.

A case is the same if method, model, length, ranks, batch and layers are; what else differs (options, hardware, kernel,
dtype, stack) is said in its row, and so is the mode of our numbers.  Pure functions; escaping is the business of
whoever shows the text.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from cpbench.case import STACKS
from cpbench.model_config import PRESETS
from cpbench.published import Published, PublishedMethod, PublishedValue
from cpbench.record import Record
from cpbench.report.baseline import Heading
from cpbench.report.columns import MISSING, Cell
from cpbench.report.frame import harmless
from cpbench.report.identity import stack_words
from cpbench.report.palette import MODE_WORD, STATUS_WORDS
from cpbench.report.series import Overview, Point
from cpbench.report.tables import case_title
from cpbench.units import format_bytes, format_rate

LIMIT = 0.1
"""Differences above it are marked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BesidePublished:
    """What the section "Beside the published results" shows."""

    lead: tuple[str, ...]
    """Sentences: of what and how many, what a mark means, what kinds of numbers meet."""
    sources: tuple[tuple[str, str], ...]
    """(text, address) of every source that is used."""
    columns: tuple[Heading, ...]
    rows: tuple[tuple[Cell, ...], ...]
    table: tuple[dict[str, str | float | int | bool | None], ...]
    """The same as plain values, one row a case."""


@dataclass(frozen=True, slots=True)
class _Pair:
    title: str
    point: Point
    published: Published
    method: PublishedMethod
    value: PublishedValue

    @property
    def record(self) -> Record:
        return self.point.record

    @property
    def peak_kind(self) -> str:
        return "allocated" if self.record.peak_reserved_bytes is None else "reserved"

    @property
    def peak_bytes(self) -> int | None:
        return self.record.peak_reserved_bytes or self.record.peak_allocated_bytes

    @property
    def kernel(self) -> str:
        return self.method.kernel or self.published.kernel

    @property
    def memory_ratio(self) -> float | None:
        return _ratio(self.peak_bytes, self.value.peak_bytes)

    @property
    def speed_ratio(self) -> float | None:
        return _ratio(self.record.tokens_per_second_per_gpu, self.value.tokens_per_second_per_gpu)

    @property
    def differing(self) -> tuple[str, ...]:
        """What else differs between the two settings, theirs first."""
        r, p = self.record, self.published
        hardware = r.hardware if r.mode == "estimate" else (r.gpu or "an unknown GPU")
        same = hardware == (p.profile if r.mode == "estimate" else p.gpu)
        found = [
            f"{name}: {json.dumps(value)}, ours {json.dumps(r.options.get(name))}"
            for name, value in self.method.options.items()
            if r.options.get(name) != value
        ]
        if not same:
            found.append(f"hardware: {p.gpu}, ours {hardware}")
        if r.attention_backend is not None and r.attention_backend != self.kernel:
            found.append(f"kernel: {self.kernel}, ours {r.attention_backend}")
        if r.dtype != "bfloat16":
            found.append(f"dtype: ours {r.dtype}")
        if r.stack != STACKS.get(p.stack):
            found.append(f"ours: {stack_words(r.stack)}")
        if r.nodes != p.nodes:
            found.append(f"nodes: {p.nodes}, ours {r.nodes}")
        return tuple(found)


def beside_published(overview: Overview, published: Sequence[Published]) -> BesidePublished | None:
    """Return the cases that are published too, beside the published values; None if there is none.

    Args:
        overview: the runs of the report.
        published: every published comparison that is known.
    """
    pairs = []
    for panel in overview.panels:
        for series in panel.series:
            for point in series.points:
                for source in published:
                    found = source.value(point.record.method, point.record.seq_len)
                    if found is not None and _same(point.record, source):
                        pairs.append(_Pair(case_title([point], series, panel), point, source, *found))
    if not pairs:
        return None
    return BesidePublished(
        lead=_lead(pairs),
        sources=_sources(pairs),
        columns=_COLUMNS,
        rows=tuple(_row(pair) for pair in pairs),
        table=tuple(_plain(pair) for pair in pairs),
    )


def published_csv(found: BesidePublished) -> str:
    """Return the rows as CSV; a missing number is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(found.table[0]), lineterminator="\n")
    writer.writeheader()
    for row in found.table:
        writer.writerow({key: harmless(v) if isinstance(v, str) else v for key, v in row.items()})
    return text.getvalue()


def _same(record: Record, published: Published) -> bool:
    """Whether a record is of the model and the ranks of a published comparison, on a GPU or for one."""
    return (
        record.device == "cuda"
        and record.model == published.model
        and record.architecture == PRESETS.get(published.model)
        and record.world_size == published.world_size
        and record.batch_size == published.batch_size
        and record.status not in ("unsupported", "error", "timeout", "invalid")
    )


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs


def _over(ratio: float | None) -> bool:
    return ratio is not None and abs(ratio - 1) > LIMIT


def _outcome_differs(pair: _Pair) -> bool:
    return (pair.record.status == "ok") != (pair.value.status == "ok")


_COLUMNS = (
    Heading(title="Case", about="Series and length", numeric=False),
    Heading(title="Mode", about="How our numbers came to be", numeric=False),
    Heading(title="Peak ratio", about="Ours over published"),
    Heading(title="Speed ratio", about="Ours over published"),
    Heading(title="Status", about="Outcome of our case", numeric=False),
    Heading(title="Status there", about="Outcome in the source", numeric=False),
    Heading(title="Peak", about="Our peak, largest over ranks"),
    Heading(title="Peak there", about="Peak of a GPU as the source has it"),
    Heading(title="Tokens/s", about="Ours, per second and rank"),
    Heading(title="Tokens/s there", about="The source's, per second and GPU"),
    Heading(title="Kernel there", about="The source's attention kernel", numeric=False),
    Heading(
        title="Setting differs in",
        about="What is not the same, the source's first",
        numeric=False,
    ),
    Heading(title="Published as", about="The source's name of the method, and the source", numeric=False),
)


def _row(pair: _Pair) -> tuple[Cell, ...]:
    r, v = pair.record, pair.value
    differing = "; ".join(pair.differing) or "nothing"
    name = f"{pair.method.name}, {pair.published.short}"
    ours, theirs = pair.point.outcome.name, STATUS_WORDS[v.status].name
    other = _outcome_differs(pair)
    return (
        Cell(pair.title, pair.title),
        Cell(MODE_WORD[r.mode], r.mode),
        _ratio_cell(pair.memory_ratio),
        _ratio_cell(pair.speed_ratio),
        Cell(f"{ours} !" if other else ours, ours, "bad" if other else ""),
        Cell(theirs, theirs),
        Cell(format_bytes(pair.peak_bytes), pair.peak_bytes),
        Cell(format_bytes(v.peak_bytes), v.peak_bytes),
        Cell(format_rate(r.tokens_per_second_per_gpu), r.tokens_per_second_per_gpu),
        Cell(format_rate(v.tokens_per_second_per_gpu), v.tokens_per_second_per_gpu),
        Cell(pair.kernel, pair.kernel),
        Cell(differing, differing),
        Cell(name, name),
    )


def _ratio_cell(ratio: float | None) -> Cell:
    if ratio is None:
        return Cell(MISSING, None)
    over = _over(ratio)
    return Cell(f"{ratio:.3f}" + (" !" if over else ""), ratio, "bad" if over else "")


def _plain(pair: _Pair) -> dict[str, str | float | int | bool | None]:
    r, v = pair.record, pair.value
    sources = (v.source or pair.method.source, v.memory_source)
    return {
        "run": pair.point.entry.run,
        "case_id": r.case_id,
        "method": r.method,
        "options": ", ".join(f"{name}={value}" for name, value in sorted(r.options.items())),
        "model": r.model,
        "seq_len": r.seq_len,
        "world_size": r.world_size,
        "mode": r.mode,
        "hardware": r.hardware,
        "status": r.status,
        "published_status": v.status,
        "status_differs": _outcome_differs(pair),
        "peak_bytes": pair.peak_bytes,
        "peak_kind": pair.peak_kind,
        "published_peak_bytes": v.peak_bytes,
        "peak_ratio": pair.memory_ratio,
        "peak_differs": _over(pair.memory_ratio),
        "tokens_per_second_per_gpu": r.tokens_per_second_per_gpu,
        "published_tokens_per_second_per_gpu": v.tokens_per_second_per_gpu,
        "speed_ratio": pair.speed_ratio,
        "speed_differs": _over(pair.speed_ratio),
        "published_kernel": pair.kernel,
        "setting_differs": "; ".join(pair.differing),
        "published_method": pair.method.name,
        "arxiv": pair.published.arxiv,
        "source": "; ".join(pair.published.sources[name].text for name in sources if name),
    }


def _lead(pairs: Sequence[_Pair]) -> tuple[str, ...]:
    names = dict.fromkeys(f"{p.published.title} (arXiv {p.published.arxiv})" for p in pairs)
    modes = [word for mode, word in MODE_WORD.items() if any(p.record.mode == mode for p in pairs)]
    sentences = [
        f"{_count(len(pairs), 'case')} of this report, published in {' and in '.join(names)}.",
        f"Our numbers are {' or '.join(modes)}, as each row says; a ratio is ours over published.",
        f"! marks ratios that are off by more than {LIMIT:.0%}, and other outcomes.",
    ]
    for what, ratios in (
        ("peak", [pair.memory_ratio for pair in pairs]),
        ("speed", [pair.speed_ratio for pair in pairs]),
    ):
        known = [ratio for ratio in ratios if ratio is not None]
        if known:
            sentences.append(
                f"{_count(len(known), what)} can be compared: ratios from {min(known):.3f} to {max(known):.3f}, "
                f"{sum(map(_over, known))} marked."
            )
    kinds = " or ".join(sorted({pair.peak_kind for pair in pairs}))
    theirs = dict.fromkeys(f"published memory is the {pair.published.memory}." for pair in pairs)
    return (*sentences, *(f"Our peak is of {kinds} memory; {words}" for words in theirs))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _sources(pairs: Sequence[_Pair]) -> tuple[tuple[str, str], ...]:
    found: dict[tuple[str, str], None] = {}
    for pair in pairs:
        for name in (pair.value.source or pair.method.source, pair.value.memory_source):
            if name is not None:
                source = pair.published.sources[name]
                found[source.text, source.url] = None
    return tuple(found)
