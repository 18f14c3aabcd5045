"""`make gpu` without a GPU: its steps on CPU, its limits, its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpbench import gpu_checks
from cpbench.gpu_checks import main
from cpbench.record import read_record
from tests.cpbench.report.examples import make_case, make_record

TINY = ["--device", "cpu", "--model", "tiny", "--dtype", "float32", "--world", "2", "--rank", "1"]
EMULATED = make_record(make_case("ulysses", mode="emulate", rank=0))


def test_everything_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing runs, nothing fails, and the table says so."""
    assert (
        main([*TINY, "--out", str(tmp_path), *(f"--skip={s}" for s in ("parity", "sweep", "throughput"))])
        == 0
    )
    assert capsys.readouterr().out.count("not run") == 4


def test_a_step_without_time_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No time left: no step starts, and the exit code is 1."""
    assert main([*TINY, "--out", str(tmp_path), "--limit", "0"]) == 1
    assert "no time left" in capsys.readouterr().out
    assert not list(tmp_path.glob("sweep-*"))


def test_only_what_an_earlier_call_left_is_removed(tmp_path: Path) -> None:
    """A folder with other files keeps them."""
    for name in ("mine.txt", "table.txt"):
        (tmp_path / name).write_text("old", encoding="utf-8")
    (tmp_path / "sweep-1K" / "cases").mkdir(parents=True)
    main([*TINY, "--out", str(tmp_path), "--limit", "0"])
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "old"
    assert (tmp_path / "table.txt").read_text(encoding="utf-8") != "old"
    assert not (tmp_path / "sweep-1K").exists()


def test_without_a_gpu_it_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line; what lies in the folder stays."""
    (tmp_path / "table.txt").write_text("old", encoding="utf-8")
    monkeypatch.setattr(gpu_checks, "visible_gpus", lambda: ((), None))

    assert main(["--out", str(tmp_path)]) == 2
    assert "need a visible GPU" in capsys.readouterr().err
    assert (tmp_path / "table.txt").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize(("estimated", "code"), [(100, 0), (103, 0), (104, 1), (98, 1)])
def test_an_estimate_that_is_too_far_off_is_a_failure(
    estimated: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further than -1 or +3 %: exit code 1, after the table and the records are written."""

    def sweep(checks: gpu_checks.Checks, sweep: gpu_checks.Sweep, limit: float) -> int:
        record = EMULATED.model_copy(update={"peak_allocated_bytes": 100, "estimated_peak_bytes": estimated})
        folder = checks.given.out / sweep.name / "cases"
        folder.mkdir(parents=True)
        (folder / "case.json").write_text(record.model_dump_json(), encoding="utf-8")
        return 0

    monkeypatch.setattr(gpu_checks.Checks, "_sweep", sweep)

    assert main([*TINY, "--out", str(tmp_path), "--skip=parity", "--skip=throughput", "--length=1K"]) == code
    assert (" !" in (tmp_path / "table.txt").read_text(encoding="utf-8")) == bool(code)
    assert (tmp_path / "records.jsonl").read_text(encoding="utf-8").count("\n") == 1


def test_what_parity_could_not_run_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A method that ran at no shape has a line with the reason, and is not among those that passed."""

    def parity(checks: gpu_checks.Checks, command: object, limit: float) -> int:
        findings = [
            {"what": "method", "name": "ring", "passed": True, "worst": ""},
            {"what": "method", "name": "ring", "passed": None, "worst": "too short"},
            {"what": "method", "name": "torch-ring", "passed": None, "worst": "needs processes"},
        ]
        (checks.given.out / "parity.json").write_text(json.dumps(findings), encoding="utf-8")
        return 0

    monkeypatch.setattr(gpu_checks.Checks, "_run", parity)

    assert main([*TINY, "--out", str(tmp_path), "--skip=sweep", "--skip=throughput"]) == 0
    out = capsys.readouterr().out
    assert "methods  ring  pass\n" in out
    assert "not run: torch-ring: needs processes" in out
    assert "too short" not in out


@pytest.mark.slow
def test_a_sweep_gives_records_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One emulated case of two layers: its record, its row with the estimate's error, and one line a record."""
    arguments = ["--skip=parity", "--skip=throughput", "--method=ulysses", "--length=512", "--layers=2"]
    assert main([*TINY, "--out", str(tmp_path), *arguments]) == 0

    (file,) = (tmp_path / "sweep-512" / "cases").glob("*.json")
    record = read_record(file)
    assert (record.status, record.mode, record.rank, record.architecture.num_layers) == (
        "ok",
        "emulate",
        1,
        2,
    )
    assert record.estimate_error == pytest.approx(0.0, abs=0.01)
    table = capsys.readouterr().out
    assert "2/4" in table
    assert "+0.00%" in table
    (line,) = (tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["case_id"] == record.case_id
