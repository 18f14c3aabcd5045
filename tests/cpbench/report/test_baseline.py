"""The runs of a report against a baseline: rows, what is said of each, the section in page and summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cpbench.cli import app
from cpbench.errors import CpbenchError
from cpbench.record import Record
from cpbench.report import build
from cpbench.report.baseline import Comparison, compare
from cpbench.report.load import Entry
from cpbench.report.series import Overview, arrange
from cpbench.units import MIB
from tests.cpbench.report.examples import (
    NODE,
    make_case,
    make_failure,
    make_record,
    mixed_records,
    smoke_records,
    write_run,
)


def _overview(records: Sequence[Record], run: str = "mine") -> Overview:
    return arrange([Entry(run=run, record=record) for record in records])


def _compared(now: Sequence[Record], before: Sequence[Record]) -> Comparison:
    return compare(_overview(now), _overview(before, "reference"), "reference")


def _rows(comparison: Comparison) -> list[dict[str, str]]:
    titles = [column.title for column in comparison.columns]
    return [dict(zip(titles, (cell.text for cell in row), strict=True)) for row in comparison.rows]


def test_equal_runs_differ_in_nothing() -> None:
    """A run against itself has a row for every case, all differences zero."""
    # given
    records = smoke_records()
    # when
    found = _compared(records, records)
    # then
    rows = _rows(found)
    assert len(rows) == len(records)
    assert {row["Peak %"] for row in rows} == {row["Step %"] for row in rows} == {"+0.00%"}
    assert {row["Peak difference"] for row in rows} == {"0 B"}
    assert {row["Differs in"] for row in rows} == {"nothing"}
    assert found.flagged == found.only_here == found.only_there == ()
    assert found.lead[0] == "12 of 12 cases of this run have a counterpart."


def test_a_planted_regression_shows() -> None:
    """A case that needs more memory and time than in the baseline says how much, and the lead names it."""
    # given
    before = [make_record(make_case("ring"), peak_allocated_bytes=100 * MIB, step_seconds=2.0)]
    now = [make_record(make_case("ring"), peak_allocated_bytes=112 * MIB, step_seconds=2.5)]
    # when
    found = _compared([*now, make_record(make_case("upipe"))], [*before, make_record(make_case("upipe"))])
    # then
    row = _rows(found)[0]
    assert (row["Peak before"], row["Peak"]) == ("100 MiB", "112 MiB")
    assert (row["Peak %"], row["Peak difference"]) == ("+12.00%", "+12.0 MiB")
    assert (row["Step before"], row["Step"], row["Step %"]) == ("2 s", "2.5 s", "+25.00%")
    assert "Peak allocated differs by +0.00% (upipe, 1K) to +12.00% (ring, 1K)." in found.lead


def test_a_case_that_is_no_longer_ok_is_flagged() -> None:
    """From ok to out of memory is flagged in the row and listed; its numbers are missing, not zero."""
    # given
    case = make_case("ring")
    # when
    found = _compared([make_failure(case, "oom_device", "no room")], [make_record(case)])
    # then
    row = _rows(found)[0]
    assert (row["Status before"], row["Status"]) == ("ok", "OOM, was ok")
    assert (row["Peak"], row["Peak %"], row["Peak difference"], row["Step %"]) == ("-", "-", "-", "-")
    assert found.flagged == ("ring, 1K: ok in the baseline, now OOM",)
    assert [cell.kind for cell in found.rows[0]].count("bad") == 1


@pytest.mark.parametrize("status", ["ok", "oom_device"])
def test_a_case_that_failed_before_is_not_flagged(status: str) -> None:
    """Mended cases and cases that fail as before are no regression."""
    # given
    case = make_case("ring")
    failure = make_failure(case, "oom_device", "no room")
    # when
    found = _compared([make_record(case) if status == "ok" else failure], [failure])
    # then
    assert found.flagged == ()
    assert _rows(found)[0]["Status before"] == "OOM"


def test_steps_and_warmup_do_not_keep_cases_apart() -> None:
    """A longer measurement of the same case is its counterpart, and the row says that the steps differ."""
    # when
    found = _compared([make_record(make_case("ring", steps=9))], [make_record(make_case("ring"))])
    # then
    assert _rows(found)[0]["Differs in"] == "steps: 3 after 2, now 9 after 2"


@pytest.mark.parametrize(
    "change", [{"seed": 7}, {"batch_size": 2}, {"stack": "plain"}, {"dtype": "bfloat16"}]
)
def test_another_case_is_no_counterpart(change: dict[str, object]) -> None:
    """What changes the question keeps cases apart; both sides list theirs, and the lead says it."""
    # when
    found = _compared([make_record(make_case("ring", **change))], [make_record(make_case("ring"))])
    # then
    assert found.rows == ()
    assert found.lead == ("No case of this run has a counterpart in the baseline, so nothing is compared.",)
    assert len(found.only_here) == len(found.only_there) == 1
    assert found.only_there[0].startswith("ring, 1K (")
    assert "4 ranks, seed 0, measured on cpu-2x-intel-xeon-processor" in found.only_there[0]


def test_an_unresolved_failure_meets_the_case_it_would_have_been() -> None:
    """A case refused before its options were filled in still counts as no longer ok."""
    # given
    before = make_record(make_case("upipe", options={"stage_heads": 4}, ulysses_degree=4, ring_degree=1))
    # when
    found = _compared([make_failure(make_case("upipe"), "unsupported", "no")], [before])
    # then
    assert [row["Status"] for row in _rows(found)] == ["unsupported, was ok"]


def test_an_unresolved_failure_that_may_be_two_cases_is_not_guessed() -> None:
    """Where two cases of the baseline fit, neither is taken."""
    # given
    before = [make_record(make_case("upipe", options={"stage_heads": heads})) for heads in (2, 4)]
    # when
    found = _compared([make_failure(make_case("upipe"), "unsupported", "no")], before)
    # then
    assert found.rows == ()
    assert len(found.only_there) == 2


def test_the_circumstances_that_differ_are_said() -> None:
    """Another machine, torch, kernel, source and commit are each named with both values."""
    # given
    before = make_record(make_case("ring"))
    changes = {
        "torch": "2.14.0",
        "attention_backend": "math",
        "method_source_hash": None,
        "git_commit": "abc",
    }
    # when
    found = _compared([make_record(make_case("ring"), NODE, **changes)], [before])
    # then
    assert _rows(found)[0]["Differs in"].split("; ") == [
        "machine: cpu-2x-intel-xeon-processor, now 8x-h100-80gb-hbm3",
        "torch: 2.13.0, now 2.14.0",
        "kernel: cpu-flash, now math",
        "method source: 0123456789ab, now unknown",
        "commit: fb16e7bc4817, now abc",
    ]
    assert "1 of 1 were run on another machine" in found.lead[-1]


def test_machines_with_one_name_are_told_apart() -> None:
    """A machine that calls itself the same but has another memory is another machine."""
    # given
    bigger = NODE.model_copy(update={"host_memory_bytes": 2 * NODE.host_memory_bytes})
    # when
    found = _compared([make_record(make_case("ring"), bigger)], [make_record(make_case("ring"), NODE)])
    # then
    assert _rows(found)[0]["Differs in"] == "machine: 8x-h100-80gb-hbm3, now 8x-h100-80gb-hbm3 #2"


def test_no_difference_is_computed_between_modes() -> None:
    """Records of two modes under one case id show both numbers, the modes, and no difference."""
    # given
    before = make_record(make_case("ring"))
    now = before.model_copy(update={"mode": "estimate", "hardware": "h100-80g"})
    # when
    found = _compared([now], [before])
    # then
    row = _rows(found)[0]
    assert (row["Peak %"], row["Peak difference"], row["Step %"]) == ("-", "-", "-")
    assert row["Peak"] == row["Peak before"] != "-"
    assert row["Differs in"] == "mode: measured, now estimated"
    assert any("mode" in sentence for sentence in found.lead)


def test_an_estimate_is_no_counterpart_of_a_measurement() -> None:
    """Without a common case id, cases of two modes never meet."""
    # given
    records = mixed_records()
    measured = [record for record in records if record.mode == "measure"]
    others = [record for record in records if record.mode != "measure"]
    # when
    found = _compared(measured, others)
    # then
    assert measured
    assert others
    assert found.rows == ()


def test_numbers_that_have_no_ratio_are_dashes() -> None:
    """A baseline of zero, or one so small that the ratio is no number, gives no percentage."""
    # given
    before = make_record(make_case("ring"), peak_allocated_bytes=0, step_seconds=5e-324)
    # when
    row = _rows(_compared([make_record(make_case("ring"))], [before]))[0]
    # then
    assert (row["Peak %"], row["Step %"]) == ("-", "-")


def test_of_two_copies_the_one_from_the_same_machine_counts() -> None:
    """A baseline with the case from two machines is compared with the one that the run was made on."""
    # given
    before = [
        make_record(make_case("ring"), started="2026-01-01T00:00:00Z"),
        make_record(make_case("ring"), NODE, started="2026-03-01T00:00:00Z"),
    ]
    # when
    found = _compared([make_record(make_case("ring"))], before)
    # then
    assert _rows(found)[0]["Differs in"] == "nothing"
    assert len(found.only_there) == 1


def test_page_and_summary_have_the_section_and_the_charts_stay(tmp_path: Path) -> None:
    """The page names the baseline and what is no longer ok; charts and records.csv have the run alone."""
    # given
    case = make_case("ring", seq_len=1024)
    failing = [
        make_failure(case, "oom_device", "no") if r.case_id == case.case_id else r for r in smoke_records()
    ]
    run = write_run(tmp_path / "mine", failing)
    evil = make_record(make_case("<script>alert(1)</script>"), git_commit="<img src=x>")
    baseline = write_run(tmp_path / "reference", [*smoke_records(), evil])
    (baseline / "cases" / "cut.json").write_text("{")
    # when
    plain = build([run], tmp_path / "plain")
    result = build([run], tmp_path / "out", baseline)
    # then
    page, summary = result.page.read_text("utf-8"), (tmp_path / "out" / "summary.md").read_text("utf-8")
    for text in (page, summary):
        assert "Against the baseline reference" in text
        assert "ring (4 ranks), 1K: ok in the baseline, now OOM" in text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert "<script>alert" not in text
    assert page.count('<table class="sortable') == 2
    assert [sentence for sentence in result.skipped if sentence.startswith("baseline reference: ")]
    assert "Against the baseline" not in plain.page.read_text("utf-8")
    assert _chart_data(page) == _chart_data(plain.page.read_text("utf-8"))
    csv = [(tmp_path / name / "records.csv").read_bytes() for name in ("plain", "out")]
    assert csv[0] == csv[1]


def _chart_data(page: str) -> object:
    return json.loads(page.split('id="chart-data">')[1].split("</script>")[0])


def test_a_baseline_named_as_the_run_is_told_from_it(tmp_path: Path) -> None:
    """The folder around it is added to a baseline's name that a run has as well."""
    # given
    run = write_run(tmp_path / "runs" / "smoke", smoke_records()[:1])
    baseline = write_run(tmp_path / "laptop" / "smoke", smoke_records()[:1])
    # when
    build([run], tmp_path / "out", baseline)
    # then
    assert "## Against the baseline laptop/smoke" in (tmp_path / "out" / "summary.md").read_text("utf-8")


@pytest.mark.parametrize("content", [None, {}, {"x.json": "{"}])
def test_a_baseline_without_records_is_refused(tmp_path: Path, content: dict[str, str] | None) -> None:
    """A missing, empty or broken baseline is one sentence, and no report is written."""
    # given
    run = write_run(tmp_path / "mine", smoke_records()[:1])
    if content is not None:
        (tmp_path / "reference").mkdir()
        for name, text in content.items():
            (tmp_path / "reference" / name).write_text(text)
    # when
    with pytest.raises(CpbenchError, match="reference"):
        build([run], tmp_path / "out", tmp_path / "reference")
    # then
    assert not (tmp_path / "out").exists()


def test_the_command_takes_a_baseline_by_name(tmp_path: Path) -> None:
    """`--baseline` is a run in --runs as RUN is; an unknown one is a usage error; --json names the tables."""
    # given
    for name in ("mine", "reference"):
        write_run(tmp_path / name, smoke_records()[:1])
    command = [
        "report",
        "mine",
        "--runs",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--json",
        "--baseline",
    ]
    # when
    refused = CliRunner().invoke(app, [*command, "gone"])
    written = (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*command, "reference"])
    # then
    assert (refused.exit_code, written) == (2, False)
    assert "baseline 'gone'" in refused.stderr
    assert done.exit_code == 0
    names = [Path(table).name for table in json.loads(done.stdout)["tables"]]
    assert names == ["records.csv", "records.parquet", "summary.md"]
    assert "Against the baseline reference" in (tmp_path / "out" / "summary.md").read_text("utf-8")
