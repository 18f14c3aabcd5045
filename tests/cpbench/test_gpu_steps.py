"""Steps of `make gpu` as they are, on CPU, with small models; their verdicts and tables: `test_gpu_checks`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpbench.gpu_checks import main
from cpbench.record import read_record
from cpbench.verification import VerifyReport
from tests.cpbench.test_gpu_checks import TINY, checked, only

pytestmark = pytest.mark.slow


def test_a_sweep_gives_records_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One emulated case of two layers: its record, its row with the estimate's error, and one line a record."""
    arguments = [*only("sweep"), "--method=ulysses", "--length=512", "--layers=2"]
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


def test_steps_without_a_sweep_run_on_cpu(tmp_path: Path) -> None:
    """Kernels, rates and a verification of two methods, by real processes, leave files that the table reads."""
    arguments = [*only("kernels", "rates", "verify"), "--scale=64", "--verify-world=2"]

    code, table = checked(tmp_path, *arguments, "--method=ulysses", "--method=torch-ring")

    assert code == 0
    assert "  cpu-flash  pass\n" in table
    assert "  attention_backward  cpu-flash, 32/8 heads, 32 x 32 causal  " in table
    assert "  pass  ulysses\n" in table
    assert "  unsupported  torch-ring, torch-ring rotate=alltoall\n    torch-ring: context_parallel " in table
    report = VerifyReport.model_validate_json((tmp_path / "verify.json").read_bytes())
    assert not any(c.kind in ("loss", "peaks") for result in report.results for c in result.checks)


def test_measured_and_estimated_agree_on_cpu(tmp_path: Path) -> None:
    """A world of one, trained and estimated: the same peak."""
    arguments = [*only("measured"), "--measured-length=512", "--method=single", "--measured-limit=200"]

    code, table = checked(tmp_path, *arguments)

    assert code == 0, table
    (line,) = (line for line in table.splitlines() if line.startswith("  single  512  ok"))
    assert "+0.00%" in line
