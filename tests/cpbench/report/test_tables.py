"""Rows of text: the results table, failures, warnings and summary.md."""

from __future__ import annotations

from collections.abc import Sequence

from cpbench.record import Record
from cpbench.report.findings import findings, introduction
from cpbench.report.load import Entry, Loaded, RunFacts
from cpbench.report.series import Overview, arrange
from cpbench.report.tables import (
    Table,
    environment,
    failures,
    loss_note,
    results_table,
    summary_markdown,
    warnings,
)
from tests.cpbench.report.examples import (
    long_records,
    make_case,
    make_failure,
    make_record,
    mixed_records,
    smoke_records,
    troubled_records,
)


def _shown(records: Sequence[Record]) -> tuple[Overview, Loaded]:
    entries = tuple(Entry(run="run", record=record) for record in records)
    facts = RunFacts(name="run", records=len(entries), command="cpbench sweep", planned=len(entries))
    return arrange(entries), Loaded(entries=entries, runs=(facts,), skipped=("run: bad.json is too new",))


def _column(table: Table, title: str) -> list[str]:
    index = [column.title for column in table.columns].index(title)
    return [row[index].text for row in table.rows]


def test_a_row_for_every_case() -> None:
    """The table has all cases, ordered by method and length, with formatted numbers."""
    table = results_table(_shown(smoke_records())[0])

    assert _column(table, "Method") == ["single"] * 3 + ["ring"] * 3 + ["ulysses"] * 3 + ["upipe"] * 3
    assert _column(table, "Length") == ["1K", "2K", "4K"] * 4
    assert all(text.endswith("MiB") for text in _column(table, "Peak allocated"))


def test_a_missing_value_is_a_dash_and_sorts_as_missing() -> None:
    """A case without numbers shows neither 0 nor NaN."""
    table = results_table(_shown([make_failure(make_case("ring"), "oom_device", "no")])[0])

    assert _column(table, "Peak allocated") == ["-"]
    assert _column(table, "Status") == ["OOM"]
    assert not any("nan" in cell.text.lower() or cell.text == "0" for cell in table.rows[0])
    by_title = dict(zip((column.title for column in table.columns), table.rows[0], strict=True))
    assert by_title["Step"].sort is None


def test_columns_that_say_nothing_are_left_out_and_named() -> None:
    """On CPU nothing is reserved by a caching allocator; one model and one dtype need no column."""
    table = results_table(_shown(smoke_records())[0])
    titles = {column.title for column in table.columns}

    assert not titles & {"Peak reserved", "MFU", "Model", "Dtype", "Stack"}
    assert "Peak reserved" in table.left_out


def test_the_mode_is_always_a_column() -> None:
    """Every row says how its numbers came to be."""
    assert {"measured"} == set(_column(results_table(_shown(smoke_records())[0]), "Mode"))
    assert {"measured", "emulated", "estimated"} == set(
        _column(results_table(_shown(mixed_records())[0]), "Mode")
    )


def test_an_emulation_shows_compute_communication_and_the_estimates_error() -> None:
    """What was measured, what was modelled, and how far the estimate is off; other rows have none of it."""
    emulated = make_record(make_case("ring", mode="emulate", rank=0)).model_copy(
        update={
            "compute_seconds": 0.085,
            "communication_seconds": 0.012,
            "peak_allocated_bytes": 1000,
            "estimated_peak_bytes": 1003,
        }
    )
    table = results_table(_shown([emulated, make_record(make_case("ring"))])[0])

    for title, text in (("Compute", "85 ms"), ("Modelled comm.", "12 ms"), ("Estimate error", "+0.30%")):
        assert set(_column(table, title)) == {text, "-"}


def test_failures_say_case_status_and_reason() -> None:
    """Every case without a plotted number is listed with its reason; the log is apart."""
    found = {(f.case, f.status): f for f in failures(_shown(troubled_records())[0])}

    assert found["upipe (4 ranks), 1K", "unsupported"].reason == "upipe: stage_heads=3 does not fit"
    assert "last lines of rank 3" in found["upipe (4 ranks), 2K", "error"].details
    assert "differs from the one of single by 0.19" in found["ulysses (4 ranks), 2K", "loss differs"].reason
    assert len(found) == 5


def test_equal_failures_of_a_series_are_one_entry() -> None:
    """OOM at four lengths for the same reason is read once, with all lengths named."""
    cases = [failure.case for failure in failures(_shown(long_records())[0])]

    assert "torch-ring (8 ranks), 2M, 3M, 4M, 5M" in cases


def test_warnings_of_records_name_their_case() -> None:
    """A doubt about a finished case is shown with the case."""
    overview, loaded = _shown(troubled_records())

    assert warnings(overview, loaded) == (
        "single (1 rank), 1K: first loss 9.120 is far from ln(vocabulary) = 6.929",
    )


def test_an_incomplete_run_is_told() -> None:
    """An interrupted sweep says how many cases are missing."""
    overview, loaded = _shown(smoke_records())
    short = Loaded(entries=loaded.entries, runs=(RunFacts(name="run", records=12, planned=20),), skipped=())

    assert warnings(overview, short) == ("run run is not complete: 12 of 20 cases have a readable record",)


def test_the_note_on_losses_counts_what_was_compared() -> None:
    """Readers learn how many losses were checked, and when none could be."""
    assert "9 losses were compared" in loss_note(_shown(smoke_records())[0])
    assert "all agree" in loss_note(_shown(smoke_records())[0])
    assert "1 differ" in loss_note(_shown(troubled_records())[0])
    assert "No loss could be compared" in loss_note(_shown(mixed_records())[0])


def test_the_summary_has_results_failures_and_skipped_files() -> None:
    """summary.md stands alone."""
    text = summary_markdown(*_shown(troubled_records()))

    assert "measured on cpu-2x-intel-xeon-processor" in text
    assert text.count("\n| ring |") == 3
    assert "**timeout**: no end after 1800 s" in text
    assert "bad.json is too new" in text


def test_the_summary_escapes_markup_of_records() -> None:
    """A hostile name can neither break the table nor place a link, image or tag."""
    hostile = "x|y\n# z <img src=x> [a](https://evil.example) `c`"
    record = make_failure(make_case(hostile), "error", hostile)

    text = summary_markdown(*_shown([record]))

    assert "<img" not in text
    assert "](https://" not in text.replace("\\]", "")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_the_introduction_says_the_modes_and_what_they_do_not_tell() -> None:
    """CPU times and the larger memory of a single rank are put right in words."""
    text = " ".join(introduction(_shown(smoke_records())[0]))

    assert "measured on cpu-2x-intel-xeon-processor" in text
    assert "say little about GPUs" in text
    assert "naturally larger" in text
    mixed = " ".join(introduction(_shown(mixed_records())[0]))
    assert all(word in mixed for word in ("Measured:", "Emulated:", "Estimated:"))


def test_findings_compare_like_with_like() -> None:
    """The single rank does not win throughput, and the length is the longest that was compared."""
    found = {finding.question: finding for finding in findings(_shown(smoke_records())[0])}

    assert found["Cases with a result"].answer == "12 of 12"
    assert found["Least peak memory"].answer == "upipe"
    assert found["Highest throughput"].answer == "ulysses"
    assert "at 4K" in found["Highest throughput"].details


def test_the_environment_names_command_machine_and_versions() -> None:
    """A reader can tell where and how a run was made."""
    ((name, facts),) = environment(*_shown(smoke_records()))

    assert name == "run"
    assert dict(facts)["Command"] == "cpbench sweep"
    assert dict(facts)["torch"] == "2.13.0"
    assert dict(facts)["Processor"].startswith("Intel Xeon Processor @ 2.60GHz, 2 logical processors")


def test_rows_of_finished_cases_keep_their_value_for_sorting() -> None:
    """Cells sort by the stored number, not by its text."""
    record = make_record(make_case("ring"))
    table = results_table(_shown([record])[0])
    index = [column.title for column in table.columns].index("Peak allocated")

    assert table.rows[0][index].sort == record.peak_allocated_bytes
