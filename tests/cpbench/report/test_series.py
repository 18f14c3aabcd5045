"""Arranging records: what shares a line, what every line is called, what is only marked."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench.case import STACKS
from cpbench.model_config import PRESETS
from cpbench.record import Record
from cpbench.report.load import Entry
from cpbench.report.series import Overview, Series, arrange, outcome_runs, shared_length
from cpbench.units import GIB
from tests.cpbench.report.examples import (
    LAPTOP,
    NODE,
    long_records,
    make_case,
    make_failure,
    make_record,
    mixed_records,
    smoke_records,
    troubled_records,
)


def _arranged(records: Sequence[Record], run: str = "run") -> Overview:
    return arrange([Entry(run=run, record=record) for record in records])


def _all_series(overview: Overview) -> list[Series]:
    return [series for panel in overview.panels for series in panel.series]


def test_one_line_a_method_over_the_lengths() -> None:
    """The smoke sweep is one panel of four series with three points each, the reference first."""
    (panel,) = _arranged(smoke_records()).panels

    assert [series.identity.method for series in panel.series] == ["single", "ring", "ulysses", "upipe"]
    assert [[p.record.seq_len for p in series.plotted] for series in panel.series] == [[1024, 2048, 4096]] * 4


def test_the_number_of_ranks_is_in_every_label_where_it_differs() -> None:
    """`single` runs on 1 rank beside others on 4, so each label says it and the subtitle does not."""
    overview = _arranged(smoke_records())

    labels = ["single (1 rank)", "ring (4 ranks)", "ulysses (4 ranks)", "upipe (4 ranks)"]
    assert labels == [series.label for series in _all_series(overview)]
    assert "rank" not in overview.subtitle


def test_what_is_the_same_everywhere_is_said_once() -> None:
    """With one number of ranks and one mode, labels are plain and the subtitle says the rest."""
    overview = _arranged([record for record in smoke_records() if record.method != "single"])

    assert [series.label for series in _all_series(overview)] == ["ring", "ulysses", "upipe"]
    for words in ("tiny", "float32", "stack checkpoint", "batch 1", "4 ranks", "measured on cpu-2x"):
        assert words in overview.subtitle


def test_modes_and_machines_are_series_of_their_own_and_named() -> None:
    """Measured, emulated and estimated numbers of one method are separate lines whose labels say which."""
    overview = _arranged(mixed_records())

    assert [panel.title for panel in overview.panels] == ["bfloat16", "float32"]
    for panel in overview.panels:
        labels = [series.label for series in panel.series if series.identity.method == "ring"]
        assert labels == [
            "ring (measured on 8x-h100-80gb-hbm3)",
            "ring (measured on cpu-2x-intel-xeon-processor)",
            "ring (emulated on 8x-h100-80gb-hbm3)",
            "ring (estimated for h100-80g)",
        ]
    assert "estimated for h100-80g" in overview.subtitle
    assert "measured on 8x-h100-80gb-hbm3" in overview.subtitle


def test_estimates_for_another_host_memory_are_another_line() -> None:
    """The same machine profile with less memory in its nodes may end a case elsewhere."""
    cases = [
        make_case("ring", mode="estimate", device="cuda", hardware="h100-80g", host_memory_bytes=size)
        for size in (None, 2**40)
    ]

    labels = [
        series.label for series in _all_series(_arranged([make_record(case, LAPTOP) for case in cases]))
    ]

    assert labels == [
        "ring (estimated for h100-80g)",
        "ring (estimated for h100-80g with 1.00 TiB of host memory)",
    ]


_MACHINES = st.sampled_from([LAPTOP, NODE, None, LAPTOP.model_copy(update={"host_memory_bytes": 64 * GIB})])


@st.composite
def _records(draw: st.DrawFn) -> Record:
    mode = draw(st.sampled_from(["measure", "emulate", "estimate"]))
    case = make_case(
        draw(st.sampled_from(["single", "ring", "usp"])),
        seq_len=draw(st.sampled_from([1024, 2048])),
        world_size=draw(st.sampled_from([1, 2])),
        mode=mode,
        hardware=None if mode == "measure" else draw(st.sampled_from(["h100-80g", "h200"])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        stack=draw(st.sampled_from(sorted(STACKS))),
        model=draw(st.sampled_from(["tiny", "llama3.2-1b"])),
        architecture=PRESETS[draw(st.sampled_from(["tiny", "llama3.2-1b"]))],
        seed=draw(st.sampled_from([0, 1])),
        options=draw(st.sampled_from([{}, {"degree": 2}, {"degree": 4}])),
        ulysses_degree=draw(st.sampled_from([1, 2])),
    )
    machine = draw(_MACHINES)
    if draw(st.booleans()):
        return make_record(case, machine, torch=draw(st.sampled_from(["2.12.0", "2.13.0"])))
    return make_failure(case, "oom_device", "no memory left", machine)


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(_records(), min_size=1, max_size=14), runs=st.lists(st.sampled_from("ab"), min_size=14)
)
def test_no_series_mixes_what_may_not_be_compared(records: list[Record], runs: list[str]) -> None:
    """Whatever is loaded, a line has one mode, machine, dtype, stack, model, number of ranks and method."""
    entries = [Entry(run=run, record=record) for run, record in zip(runs, records, strict=False)]

    overview = arrange(entries)

    for panel in overview.panels:
        finished = [series for series in panel.series if series.plotted]
        assert len(finished) == len({series.label for series in finished}), "labels tell the series apart"
        for series in panel.series:
            found = [point.record for point in series.points]
            for name in ("mode", "method", "dtype", "model", "architecture", "world_size", "seed", "stack"):
                assert len({str(getattr(record, name)) for record in found}) == 1, name
            if found[0].mode == "estimate":
                assert len({record.hardware for record in found}) == 1
            else:
                assert len({record.machine for record in found}) == 1
            lengths = [record.seq_len for record in found]
            assert lengths == sorted(set(lengths))
    assert len(overview.points) + overview.replaced == len(entries)


def test_two_machines_of_one_name_are_not_mixed() -> None:
    """Machines that differ in memory get different names even where their labels are equal."""
    larger = LAPTOP.model_copy(update={"host_memory_bytes": 64 * GIB})
    overview = _arranged(
        [make_record(make_case("ring", seq_len=1024)), make_record(make_case("ring", seq_len=2048), larger)]
    )

    assert [series.label for series in _all_series(overview)] == [
        "ring (measured on cpu-2x-intel-xeon-processor)",
        "ring (measured on cpu-2x-intel-xeon-processor #2)",
    ]


def test_runs_that_hold_the_same_case_are_compared_as_series() -> None:
    """A baseline and a new run of one sweep are two lines a method, named by run."""
    entries = [Entry(run=run, record=record) for run in ("base", "new") for record in smoke_records()]

    labels = [series.label for series in _all_series(arrange(entries))]

    assert len(labels) == 8
    assert "ring (4 ranks, run base)" in labels


def test_runs_that_complete_one_another_share_lines() -> None:
    """Lengths measured in different runs on one machine are one line."""
    records = smoke_records()
    entries = [Entry(run=f"run{index % 3}", record=record) for index, record in enumerate(records)]

    assert len(_all_series(arrange(entries))) == 4


def test_of_copies_in_one_run_the_latest_is_shown() -> None:
    """Two files of one case give one point and are counted as replaced."""
    old = make_record(make_case("ring"), started="2026-01-01T00:00:00Z", loss=7.0)
    new = make_record(make_case("ring"), started="2026-01-02T00:00:00Z", loss=6.0)

    overview = _arranged([new, old])

    assert [point.record.loss for point in overview.points] == [6.0]
    assert overview.replaced == 1


def test_a_case_without_numbers_joins_the_series_of_its_method() -> None:
    """An unsupported case has no resolved options and no kernel, yet is marked on its method's line."""
    options = {"layout": "zigzag"}
    records = [make_record(make_case("ring", options=options, ring_degree=4))]
    records.append(make_failure(make_case("ring", seq_len=1030), "unsupported", "length"))

    (series,) = _all_series(_arranged(records))

    assert [point.record.seq_len for point in series.plotted] == [1024]
    assert [point.record.seq_len for point in series.missing] == [1030]


def test_options_are_in_the_label_where_the_method_has_several() -> None:
    """Only the option that differs is named, and other methods stay plain."""
    records = [make_record(make_case("upipe", options={"stage_heads": n, "gqa": True})) for n in (4, 8)]
    records.append(make_record(make_case("ring", options={"layout": "zigzag"})))

    labels = [series.label for series in _all_series(_arranged(records))]

    assert labels == ["ring", "upipe (stage_heads 4)", "upipe (stage_heads 8)"]


def test_a_loss_that_differs_is_not_plotted() -> None:
    """The flagged case is a mark with its words, not a point of the line."""
    flagged = [
        point
        for series in _all_series(_arranged(troubled_records()))
        for point in series.missing
        if point.record.status == "ok"
    ]

    assert [(point.record.method, point.record.seq_len, point.outcome.short) for point in flagged] == [
        ("ulysses", 2048, "loss differs")
    ]


def test_the_first_of_neighbouring_outcomes_carries_the_words() -> None:
    """OOM at three lengths in a row is written once, so that words never overlap marks."""
    (panel,) = _arranged(long_records()).panels
    series = next(series for series in panel.series if series.identity.method == "torch-ring")

    words = [text for _, text in outcome_runs(series, panel.lengths)]

    assert words == ["OOM", "", "", ""]


def test_bars_are_drawn_at_the_longest_length_common_to_the_methods() -> None:
    """The single rank runs out of memory first and does not hold the others back."""
    (panel,) = _arranged(long_records()).panels

    length, having = shared_length(panel, lambda record: record.peak_allocated_bytes is not None)

    assert length == 2**20
    assert [s.identity.method for s in having] == ["torch-ring", "ring", "ulysses", "usp", "fpdt", "upipe"]


@pytest.mark.parametrize("status", ["oom_device", "unsupported", "timeout", "error", "invalid", "oom_host"])
def test_records_without_any_number_are_arranged(status: str) -> None:
    """A sweep in which nothing worked is still shown."""
    (series,) = _all_series(_arranged([make_failure(make_case("ring"), status, "reason")]))  # type: ignore[arg-type]

    assert series.plotted == ()
    assert len(series.missing) == 1
