"""Cases beside published values: which match, ratios and marks, and the section in page, summary and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pytest

from cpbench.case import Case
from cpbench.folders import published_folder
from cpbench.published import Published, load_published
from cpbench.record import ModelledTime, Record
from cpbench.report import build
from cpbench.report.load import Entry
from cpbench.report.published import BesidePublished, beside_published, published_csv
from cpbench.report.series import arrange
from cpbench.units import GIB
from tests.cpbench.report.examples import (
    LAPTOP,
    NODE,
    long_records,
    make_case,
    make_failure,
    make_record,
    smoke_records,
    write_run,
)

PUBLISHED = load_published(published_folder())


def grid_case(method: str, seq_len: int, **changes: object) -> Case:
    setting: dict[str, object] = {
        "seq_len": seq_len,
        "world_size": 8,
        "model": "llama3-8b",
        "stack": "long",
        "dtype": "bfloat16",
        "device": "cuda",
        "mode": "estimate",
        "hardware": "h100-80g",
    }
    return make_case(method, **(setting | changes))


def beside(records: Sequence[Record], published: Sequence[Published] = PUBLISHED) -> BesidePublished | None:
    return beside_published(arrange([Entry(run="mine", record=record) for record in records]), published)


def rows(found: BesidePublished | None) -> list[dict[str, str]]:
    assert found is not None
    titles = [column.title for column in found.columns]
    return [dict(zip(titles, (cell.text for cell in row), strict=True)) for row in found.rows]


def test_ratios_are_ours_over_published_and_large_ones_are_marked() -> None:
    """3M of ulysses: 64.6 GiB and 162.41 tokens/s are published; a tenth more is not marked, half is."""
    case = grid_case("ulysses", 3 * 2**20)
    near = make_record(
        case, peak_allocated_bytes=round(64.6 * 1.09 * GIB), tokens_per_second_per_gpu=162.41 / 2
    )

    (row,) = rows(beside([near]))

    assert row["Peak ratio"] == "1.090"
    assert row["Speed ratio"] == "0.500 !"
    assert row["Peak there"] == "64.6 GiB"
    assert row["Mode"] == "estimated"
    assert (row["Status"], row["Status there"]) == ("ok", "ok")
    assert "FlashAttention-3, ours cpu-flash" in row["Setting differs in"]


def test_another_outcome_is_marked_and_no_ratio_is_made_of_nothing() -> None:
    """4M of ulysses is published as out of memory: no ratio, and an ok of ours is marked."""
    (row,) = rows(beside([make_record(grid_case("ulysses", 4 * 2**20))]))
    (same,) = rows(beside([make_failure(grid_case("ulysses", 4 * 2**20), "oom_device", "too much")]))

    assert (row["Status"], row["Status there"]) == ("ok !", "OOM")
    assert row["Peak ratio"] == row["Speed ratio"] == "-"
    assert (same["Status"], same["Status there"]) == ("OOM", "OOM")


@pytest.mark.parametrize(
    "changes",
    [
        {"world_size": 4},
        {"batch_size": 2},
        {"device": "cpu", "mode": "measure", "hardware": None},
        {"model": "tiny"},
        {"architecture": make_case().architecture},
        {"seq_len": 2**16},
        {"method": "usp"},
    ],
)
def test_what_is_not_the_same_case_is_not_shown(changes: dict[str, object]) -> None:
    """Other ranks, batch, device, model, a model of that name with another shape, another length or method: nothing."""
    arguments = {"method": "upipe", "seq_len": 2**17} | changes
    case = grid_case(str(arguments.pop("method")), int(str(arguments.pop("seq_len"))), **arguments)

    assert beside([make_record(case, LAPTOP)]) is None


def test_settings_that_differ_are_named() -> None:
    """The default upipe is not the published scheme; another profile and stack are said too."""
    plain = make_record(grid_case("upipe", 2**17, options={"published": False}, hardware="h200"))
    same = make_record(
        grid_case("upipe", 2**17, options={"published": True}), attention_backend="FlashAttention-3"
    )
    other = make_record(grid_case("ring", 2**17, stack="checkpoint", dtype="float32", nodes=2))

    told = [row["Setting differs in"] for row in rows(beside([plain, same, other]))]

    assert any("published: true, ours false" in text and "ours h200" in text for text in told)
    assert "nothing" in told
    assert any("stack checkpoint" in t and "float32" in t and "nodes: 1, ours 2" in t for t in told)


def test_the_kernel_is_that_of_the_method() -> None:
    """PyTorch's own context_parallel runs torch's own kernel, whatever the other published methods ran."""
    cases = [
        make_record(grid_case(method, 2**17), attention_backend="cuda-flash")
        for method in ("torch-ring", "ring")
    ]

    told = {(row["Kernel there"], "kernel:" in row["Setting differs in"]) for row in rows(beside(cases))}

    assert told == {("cuda-flash", False), ("FlashAttention-3", True)}


def test_measured_cases_are_held_against_reserved_memory() -> None:
    """A GPU's allocator knows what it holds; the CSV names the kind of peak, and the GPU is the published one."""
    record = make_record(grid_case("upipe", 2**17, mode="measure", hardware=None), NODE)

    found = beside([record])

    assert found is not None
    assert found.table[0]["peak_kind"] == "reserved"
    assert found.table[0]["peak_bytes"] == record.peak_reserved_bytes
    assert "hardware" not in str(found.table[0]["setting_differs"])


def test_page_summary_and_csv_have_the_section(tmp_path: Path) -> None:
    """A run of the published grid shows it everywhere, one CSV row a case; sources are linked."""
    run = write_run(tmp_path / "grid", long_records())

    result = build([run], tmp_path / "out")

    page = result.page.read_text(encoding="utf-8")
    assert '<section id="published">' in page
    assert 'href="https://rghadia.github.io/untied_ulysses_proj"' in page
    summary = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert "## Beside the published results" in summary
    table = tmp_path / "out" / "published.csv"
    assert table in result.tables
    found = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    assert {row["method"] for row in found} == {"torch-ring", "ring", "ulysses", "fpdt", "upipe"}
    assert {row["arxiv"] for row in found} == {"2602.21196"}
    peak = next(r for r in found if r["method"] == "upipe" and r["seq_len"] == str(3 * 2**20))
    assert float(peak["peak_ratio"]) == pytest.approx(
        int(peak["peak_bytes"]) / int(peak["published_peak_bytes"])
    )


def test_nothing_is_shown_where_nothing_matches(tmp_path: Path) -> None:
    """A run of another model has no section, and the file of an older report in the folder goes."""
    out = tmp_path / "out"
    build([write_run(tmp_path / "grid", long_records())], out)

    result = build([write_run(tmp_path / "smoke", smoke_records())], out)

    assert not (out / "published.csv").exists()
    assert "published.csv" not in {path.name for path in result.tables}
    assert 'id="published"' not in result.page.read_text(encoding="utf-8")
    assert "published results" not in (out / "summary.md").read_text(encoding="utf-8")


def test_text_of_a_record_stays_text(tmp_path: Path) -> None:
    """Markup in a record's kernel is escaped in page and summary, and a formula is disarmed in the CSV."""
    record = make_record(grid_case("ring", 2**17), attention_backend="<img src=x onerror=alert(1)>")

    result = build([write_run(tmp_path / "evil", [record])], tmp_path / "out")

    assert "<img src=x" not in result.page.read_text(encoding="utf-8")
    assert "<img src=x" not in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    found = beside([make_record(grid_case("ring", 2**17), hardware="=1+1")])
    assert found is not None
    assert ",'=1+1," in published_csv(found)


def test_the_modelled_parts_and_notes_of_a_record_are_shown(tmp_path: Path) -> None:
    """An estimate's exposed times, its uncertainty and its critical path are columns; notes are a section."""
    modelled = ModelledTime(
        uncertainty=0.15,
        exposed_communication_seconds=2.0,
        exposed_copy_seconds=0.25,
        busy_seconds={"compute": 9.0},
        critical_path_seconds={"backward/attention": 7.5, "forward/attention": 2.44, "forward/memory": 0.06},
        computed_flops=1e15,
    )
    record = make_record(grid_case("ring", 2**17), modelled=modelled, notes=("kernels are <not> counted",))

    other = make_record(grid_case("ring", 2**18))  # a column that says the same in every row is left out

    result = build([write_run(tmp_path / "two", [record, other])], tmp_path / "out")

    page = result.page.read_text(encoding="utf-8")
    summary = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    for text in (page, summary):
        for words in (
            "Exposed comm.",
            "2 s",
            "250 ms",
            "15%",
            "backward attention 75%, forward attention 24%",
        ):
            assert words in text
        assert "forward memory" not in text
        assert "kernels are &lt;not&gt; counted" in text
    assert '<section id="notes">' in page
    assert "## Notes" in summary
