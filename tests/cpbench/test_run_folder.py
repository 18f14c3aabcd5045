"""The run folder: layout, lock, refusal to overwrite, resuming, a full disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock

import cpbench.run_folder
from cpbench.case import Case
from cpbench.disk import refusing_bad_disk
from cpbench.errors import RecordTooNew, RunFolderError, UsageError
from cpbench.machine import this_machine
from cpbench.record import Record, Status
from cpbench.run_folder import RunFolder, RunInfo, checked_name, default_name
from cpbench.scenario import Exclude, Scenario
from tests.cpbench.workers.harness import fake_case

FACTS = {
    "machine": None,
    "cpbench_version": "0",
    "git_commit": None,
    "method_source_hash": None,
    "started": "2026-01-01T00:00:00+00:00",
    "duration_seconds": 1.0,
}


def record(case: Case, status: Status) -> Record:
    return Record.without_result(case, status, "because", FACTS)


def info(name: str = "run") -> RunInfo:
    return RunInfo(
        name=name,
        command=("cpbench", "sweep"),
        scenario=Scenario(exclude=(Exclude(method=("ring",)),)),
        mode="measure",
        device="cpu",
        mode_reason="a test",
        case_ids=("a",),
        machine=this_machine(),
        versions={"cpbench": "0"},
        git_commit=None,
        start="2026-01-01T00:00:00+00:00",
    )


def test_new_folder_is_made_and_scratch_is_cleared(tmp_path: Path) -> None:
    """Opening makes the folder with its parents; leaving removes what cases exchanged."""
    folder = RunFolder(tmp_path / "runs" / "r")
    with folder.opened(resume=False):
        folder.scratch("c").mkdir(parents=True)
        folder.write(record(fake_case("ok"), "ok"))
    assert folder.record_file(fake_case("ok").case_id).is_file()
    assert not (folder.path / "scratch").exists()


def test_an_existing_run_needs_resume(tmp_path: Path) -> None:
    """A folder that holds a run is refused without --resume and taken up with it."""
    folder = RunFolder(tmp_path / "r")
    with folder.opened(resume=False):
        folder.write_info(info())
    with pytest.raises(RunFolderError, match="--resume"), folder.opened(resume=False):
        pass
    with folder.opened(resume=True):
        assert folder.read_info() == info()


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    """A folder with other things in it is never written to, whatever the flags."""
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    for resume in (False, True):
        with pytest.raises(RunFolderError, match="holds no run"), RunFolder(tmp_path).opened(resume=resume):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_locked_folder_is_refused(tmp_path: Path) -> None:
    """While another sweep holds the lock, opening says so and offers a way out."""
    folder = RunFolder(tmp_path / "r")
    folder.cases.mkdir(parents=True)
    with (
        FileLock(folder.path / ".lock"),
        pytest.raises(RunFolderError, match="another sweep is writing"),
        folder.opened(resume=True),
    ):
        pass


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    """A sweep that fails inside leaves the folder usable."""
    folder = RunFolder(tmp_path / "r")
    with pytest.raises(KeyError), folder.opened(resume=False):
        raise KeyError
    with folder.opened(resume=True):
        pass


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    """A path below a file cannot be made: RunFolderError, and nothing is written."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with (
        pytest.raises(RunFolderError, match="--runs"),
        RunFolder(tmp_path / "file" / "r").opened(resume=False),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_resume_keeps_final_records_only(tmp_path: Path) -> None:
    """ok, out of memory, unsupported and invalid are final; error and timeout run again."""
    folder = RunFolder(tmp_path)
    folder.cases.mkdir()
    statuses: list[Status] = ["ok", "oom_device", "oom_host", "unsupported", "invalid", "error", "timeout"]
    cases = [fake_case("ok", seq_len=1 + k) for k in range(len(statuses))]
    for case, status in zip(cases, statuses, strict=True):
        folder.write(record(case, status))
    kept, problems = folder.finished([case.case_id for case in cases])
    assert {found.status for found in kept.values()} == {
        "ok",
        "oom_device",
        "oom_host",
        "unsupported",
        "invalid",
    }
    assert problems == []


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 1', "[]", "not JSON"])
def test_a_broken_record_is_named_and_run_again(tmp_path: Path, content: str) -> None:
    """A truncated or foreign record is no result: it is named and its case is not skipped."""
    folder = RunFolder(tmp_path)
    folder.cases.mkdir()
    case_id = fake_case("ok").case_id
    folder.record_file(case_id).write_text(content, encoding="utf-8")
    kept, problems = folder.finished([case_id])
    assert kept == {}
    assert case_id in problems[0]
    assert "run again" in problems[0]


def test_a_newer_record_is_not_overwritten(tmp_path: Path) -> None:
    """A record of a newer cpbench stops the resume instead of being run again over it."""
    folder = RunFolder(tmp_path)
    folder.cases.mkdir()
    case_id = fake_case("ok").case_id
    folder.record_file(case_id).write_text('{"format_version": 999}', encoding="utf-8")
    with pytest.raises(RecordTooNew, match="update cpbench"):
        folder.finished([case_id])


def test_tables_skip_broken_records(tmp_path: Path) -> None:
    """One broken record does not cost the table of the others."""
    folder = RunFolder(tmp_path)
    folder.cases.mkdir()
    folder.write(record(fake_case("ok"), "ok"))
    (folder.cases / "broken.json").write_text("{", encoding="utf-8")
    folder.write_tables()
    assert list(pd.read_parquet(tmp_path / "records.parquet")["case_id"]) == [fake_case("ok").case_id]
    assert len(pd.read_csv(tmp_path / "records.csv")) == 1


def test_tables_keep_integers_beside_missing_values(tmp_path: Path) -> None:
    """Bytes of a finished case stay integers beside a case without numbers, in both files."""
    folder = RunFolder(tmp_path)
    folder.cases.mkdir()
    finished = record(fake_case("ok"), "ok").model_copy(update={"peak_allocated_bytes": 2**53 + 1})
    folder.write(finished)
    folder.write(record(fake_case("ok", seq_len=7), "error"))
    folder.write_tables()
    frame = pd.read_parquet(tmp_path / "records.parquet", dtype_backend="numpy_nullable")
    assert frame["peak_allocated_bytes"].dtype == "Int64"
    assert frame["peak_allocated_bytes"].dropna().tolist() == [2**53 + 1]
    assert frame["peak_allocated_bytes"].isna().sum() == 1
    assert f",{2**53 + 1}," in (tmp_path / "records.csv").read_text(encoding="utf-8")


def test_no_table_without_records(tmp_path: Path) -> None:
    """A run that was interrupted before its first record has no empty table."""
    folder = RunFolder(tmp_path)
    folder.cases.mkdir()
    folder.write_tables()
    assert not list(tmp_path.glob("records.*"))


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC while a record is written becomes one sentence; the old record is whole, no temporary stays."""
    folder = RunFolder(tmp_path)
    folder.cases.mkdir()
    folder.write(record(fake_case("ok"), "ok"))
    before = folder.record_file(fake_case("ok").case_id).read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunFolderError, match="no space left") as caught:
        folder.write(record(fake_case("ok"), "error"))
    assert "--resume" in str(caught.value)
    assert before == folder.record_file(fake_case("ok").case_id).read_bytes()
    assert len(list(folder.cases.iterdir())) == 1


def test_other_errors_of_the_disk_say_which(tmp_path: Path) -> None:
    """A read-only file system is named as such, with the way out."""
    with pytest.raises(RunFolderError, match=r"Read-only file system.*--runs"), refusing_bad_disk(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system")


def test_run_json_survives_the_round_trip(tmp_path: Path) -> None:
    """run.json reads back equal, exclude rules with unset keys included."""
    folder = RunFolder(tmp_path)
    folder.write_info(info())
    assert folder.read_info() == info()
    raw = json.loads(folder.info_file.read_text(encoding="utf-8"))
    assert next(iter(raw)) == "format_version"
    assert raw["scenario"]["exclude"] == [{"method": ["ring"]}]


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ("{", "not JSON"),
        ("{}", "no format_version"),
        ('{"format_version": 99}', "update cpbench"),
        ('{"format_version": 1}', "does not follow the schema"),
    ],
)
def test_a_broken_run_json_is_one_sentence(tmp_path: Path, content: str, phrase: str) -> None:
    """A run.json that is truncated, foreign, too new or incomplete is named with what is wrong."""
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunFolderError, match=phrase):
        RunFolder(tmp_path).read_info()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", ".hidden", "-flag", "a" * 200, "a b"])
def test_names_that_are_no_folder_names_are_refused(name: str) -> None:
    """A run's name cannot leave the folder of the runs, hide, or look like a flag."""
    with pytest.raises(UsageError, match="run name"):
        checked_name(name)


def test_default_names_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sweeps started in the same second get different folders."""

    class Frozen(cpbench.run_folder.datetime):
        @classmethod
        def now(cls, tz: object = None) -> Frozen:
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(cpbench.run_folder, "datetime", Frozen)
    first = default_name("my scenario", tmp_path)
    (tmp_path / first).mkdir()
    assert (first, default_name("my scenario", tmp_path)) == (
        "20260102-030405-my-scenario",
        "20260102-030405-my-scenario-2",
    )
