"""Reading run folders: what is taken, what is named and skipped, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpbench.errors import RunFolderError
from cpbench.record import write_record
from cpbench.report.load import load_runs
from tests.cpbench.report.examples import make_case, make_record, smoke_records, write_run


def _broken_run(folder: Path, **files: str | bytes) -> Path:
    run = write_run(folder, [make_record(make_case("ring"))])
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (run / "cases" / f"{name}.json").write_bytes(raw)
    return run


def test_every_record_of_every_run_is_loaded(tmp_path: Path) -> None:
    """Entries of two runs carry their run's name, in the order of the runs."""
    first = write_run(tmp_path / "a", smoke_records()[:3])
    second = write_run(tmp_path / "b", smoke_records()[3:])

    loaded = load_runs([first, second])

    assert [entry.run for entry in loaded.entries] == ["a"] * 3 + ["b"] * 9
    assert loaded.skipped == ()


def test_a_run_given_twice_is_read_once(tmp_path: Path) -> None:
    """The same folder under two spellings is one run."""
    run = write_run(tmp_path / "a", smoke_records())

    assert len(load_runs([run, run / ".." / "a"]).entries) == 12


def test_runs_with_one_name_are_told_apart(tmp_path: Path) -> None:
    """Two folders of the same name are shown with their parents."""
    runs = [write_run(tmp_path / parent / "run", smoke_records()) for parent in ("old", "new")]

    assert [facts.name for facts in load_runs(runs).runs] == ["old/run", "new/run"]


def test_a_folder_of_records_is_a_run(tmp_path: Path) -> None:
    """Records may lie in the folder itself, beside files that are no records."""
    for record in smoke_records()[:2]:
        write_record(record, tmp_path / f"{record.case_id}.json")
    (tmp_path / "machine.json").write_text("{}")

    loaded = load_runs([tmp_path])

    assert len(loaded.entries) == 2
    assert loaded.skipped == ()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"format_version": 999}', "format version 999"),
        ('{"format_version": 1, "case_id": "x', "truncated or is not JSON"),
        ("hello", "truncated or is not JSON"),
        ("[1, 2]", "no format_version"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("[" * 100_000, ""),
        ('{"format_version": 1}', "does not follow the schema"),
    ],
)
def test_an_unreadable_record_is_named_and_skipped(tmp_path: Path, content: str | bytes, why: str) -> None:
    """A record that is too new, cut off, not JSON or no record costs only itself."""
    loaded = load_runs([_broken_run(tmp_path / "run", bad=content)])

    assert len(loaded.entries) == 1
    assert len(loaded.skipped) == 1
    assert "bad.json" in loaded.skipped[0]
    assert why in loaded.skipped[0]
    assert str(tmp_path) not in loaded.skipped[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("seq_len", 0), ("world_size", -4), ("peak_allocated_bytes", -1), ("loss", 1e300), ("seq_len", 10**30)],
)
def test_an_impossible_number_is_named_and_skipped(tmp_path: Path, field: str, value: float) -> None:
    """Values that the schema allows but no measurement gives do not reach an axis or a column."""
    record = json.loads(make_record(make_case("ulysses")).model_dump_json())

    loaded = load_runs([_broken_run(tmp_path / "run", bad=json.dumps(record | {field: value}))])

    assert len(loaded.entries) == 1
    assert f"{field}=" in loaded.skipped[0]


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """The message names the folder and says what to give."""
    with pytest.raises(RunFolderError, match=r"nowhere does not exist; give the folder of a run"):
        load_runs([tmp_path / "nowhere"])


def test_a_file_is_no_run(tmp_path: Path) -> None:
    """A file in place of a folder is refused by name."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is no folder"):
        load_runs([tmp_path / "file"])


def test_a_run_without_records_is_refused(tmp_path: Path) -> None:
    """An empty run says where records were expected."""
    with pytest.raises(RunFolderError, match="holds no record"):
        load_runs([write_run(tmp_path / "run", [])])


def test_a_run_of_unreadable_records_is_refused_with_reasons(tmp_path: Path) -> None:
    """When nothing can be read, the message has the reasons of the files."""
    run = write_run(tmp_path / "run", [])
    (run / "cases" / "bad.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"(?s)1 skipped.*bad\.json is truncated"):
        load_runs([run])


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"command": 5, "scenario": [], "versions": 1, "case_ids": {}}']
)
def test_run_json_is_optional_and_read_tolerantly(tmp_path: Path, text: str) -> None:
    """A missing or foreign run.json takes nothing from the records."""
    run = write_run(tmp_path / "run", smoke_records())
    (run / "run.json").write_text(text)

    facts = load_runs([run]).runs[0]

    assert facts.command is None
    assert facts.records == 12


def test_run_json_gives_command_scenario_and_dates(tmp_path: Path) -> None:
    """What the run says of itself is kept, a lone surrogate made writable."""
    run = write_run(
        tmp_path / "run",
        smoke_records(),
        command=["cpbench", "sweep", "--name", "a b"],
        scenario={"name": "smoke", "description": "Which one? \ud800"},
        start="2026-01-01T00:00:00Z",
        case_ids=["x"] * 20,
    )

    facts = load_runs([run]).runs[0]

    assert facts.command == "cpbench sweep --name 'a b'"
    assert (facts.scenario, facts.description) == ("smoke", "Which one? ?")
    assert (facts.started, facts.planned) == ("2026-01-01T00:00:00Z", 20)
