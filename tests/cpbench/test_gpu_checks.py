"""`make gpu` without a GPU: its steps on CPU, its limits, its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpbench.gpu_checks import main, signed_error
from cpbench.record import read_record

TINY = ["--device", "cpu", "--model", "tiny", "--dtype", "float32", "--world", "2", "--rank", "1"]


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
    assert abs(signed_error(record) or 1.0) < 0.01 or signed_error(record) == 0.0
    table = capsys.readouterr().out
    assert "2/4" in table
    assert "+0.00%" in table
    (line,) = (tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["case_id"] == record.case_id
