"""The committed records can be read, lie where their machine says, and every column is explained."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cpbench.errors import CpbenchError
from cpbench.kernel_finding import KernelFindings
from cpbench.rate_probe import RateProbes
from cpbench.record import STATUSES, Record, read_record
from cpbench.verification import VerifyReport
from tests.cpbench.report.examples import LAPTOP, make_case, make_record, write_run

GPU_CHECKS: dict[str, Callable[[bytes], object]] = {
    "kernels.json": KernelFindings.validate_json,
    "rates.json": RateProbes.validate_json,
    "verify.json": VerifyReport.model_validate_json,
}
"""What `make gpu` finds beside records."""
RESULTS = Path(__file__).resolve().parents[2] / "results"


def problems(results: Path) -> list[str]:
    """What is wrong with the files below a folder of results, in words."""
    found = []
    for path in sorted(results.rglob("*.json")):
        place = path.relative_to(results)
        if path.name == "run.json" and len(place.parts) == 3:
            continue
        if len(place.parts) == 2 and path.name in GPU_CHECKS:
            try:
                GPU_CHECKS[path.name](path.read_bytes())
            except ValueError as error:
                found.append(f"{place}: {error}")
            continue
        if len(place.parts) != 4 or place.parts[2] != "cases":
            found.append(f"{place} is not <machine>/<scenario>/cases/<case-id>.json")
            continue
        try:
            record = read_record(path)
        except CpbenchError as error:
            found.append(str(error))
            continue
        if record.machine is None or record.machine.name != place.parts[0]:
            found.append(f"{place} was not made on machine {place.parts[0]}")
    return found


def test_every_committed_record_can_be_read_and_is_in_its_place() -> None:
    """Reference records have the current format and lie in the folder of their machine."""
    assert problems(RESULTS) == []


def test_a_bad_result_is_found(tmp_path: Path) -> None:
    """A truncated record, one of another machine and one in the wrong place are each found; a good one is not."""
    machine, record = LAPTOP.name, make_record(make_case())
    good = write_run(tmp_path / machine / "smoke", [record])
    write_run(tmp_path / "other" / "smoke", [record])
    write_run(tmp_path / machine, [record])
    (good / "cases" / "cut.json").write_text('{"format_version": 1,')
    (tmp_path / machine / "rates.json").write_text('[{"name": "matmul"}]')

    found = problems(tmp_path)

    assert len(found) == 4
    assert any("cut.json is truncated" in text for text in found)
    assert any(text.startswith(f"{machine}/rates.json: ") for text in found)
    name = f"{record.case_id}.json"
    assert f"other/smoke/cases/{name} was not made on machine other" in found
    assert f"{machine}/cases/{name} is not <machine>/<scenario>/cases/<case-id>.json" in found


def test_the_readme_explains_every_column_and_status() -> None:
    """The first cells of the tables name each field of a record and each status, and nothing that does not exist."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")

    named = {
        name
        for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", cell)
    }

    assert named == {*Record.model_fields, *STATUSES}
