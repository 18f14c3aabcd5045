"""Records: aggregates over ranks, sanity checks, files that are too new, truncated or foreign."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cpbench.case import Case
from cpbench.errors import RecordError, RecordTooNew
from cpbench.machine import this_machine
from cpbench.record import (
    FORMAT_VERSION,
    STATUSES,
    Memory,
    RankReport,
    Record,
    Software,
    Status,
    StepSample,
    WorkerReport,
    parse_record,
    read_record,
    write_record,
    write_text_atomically,
)
from tests.cpbench.workers.harness import fake_case

FACTS: dict[str, Any] = {
    "machine": this_machine(),
    "cpbench_version": "0",
    "git_commit": "abc",
    "method_source_hash": "123",
    "started": "2026-01-01T00:00:00+00:00",
    "duration_seconds": 12.0,
}
H100 = "NVIDIA H100 80GB HBM3"


def rank(
    number: int, *, peak: int | None = 100, seconds: tuple[float, ...] = (1.0, 2.0), **more: object
) -> RankReport:
    samples = tuple(
        StepSample(step_seconds=s, forward_seconds=s / 4, backward_seconds=s / 2, optimizer_seconds=s / 4)
        for s in seconds
    )
    loss = math.log(1021)
    fields: dict[str, Any] = {
        "rank": number,
        "memory": Memory(
            peak_allocated_bytes=peak,
            peak_by_category_bytes={} if peak is None else {"parameters": peak},
            peak_by_phase_bytes={"forward": number},
        ),
        "samples": samples,
        "losses": (loss, loss),
        "grad_norms": (1.0, 1.0),
        "collective_bytes": {"all_to_all": 10 + number},
        "collective_calls": {"all_to_all": 2},
        "attention_backend": "cpu-flash",
    }
    return RankReport(**(fields | more))


def record_of(*ranks: RankReport, case: Case | None = None, gpu: str | None = None) -> Record:
    report = WorkerReport(ranks=ranks, software=Software(torch="2.13"), gpu=gpu)
    return Record.from_ranks(case or fake_case("ok"), report, FACTS)


def estimated_case(**changes: object) -> Case:
    return fake_case("ok").model_copy(
        update={"mode": "estimate", "device": "cuda", "hardware": "h100-80g", "world_size": 8} | changes
    )


def test_an_estimate_of_some_ranks_is_judged_by_the_worst() -> None:
    """Whether it fits is a matter of the rank that needs most, which is named by its number, not its place."""
    record = record_of(rank(1, peak=2**30), rank(7, peak=2**40), case=estimated_case())

    assert record.status == "oom_device"
    assert record.spread["peak_allocated_bytes"].rank == 7


def test_an_estimate_above_the_peak_rate_is_invalid() -> None:
    """A modelled step that is faster than the hardware is no result, whatever fits."""
    record = record_of(rank(0, seconds=(1e-9,)), case=estimated_case())

    assert record.status == "invalid"
    assert "above the hardware's peak" in (record.reason or "")


def test_the_headline_is_the_maximum_over_ranks() -> None:
    """Peak memory is that of the worst rank, named beside minimum and mean; the split is that rank's."""
    record = record_of(rank(0, peak=100), rank(1, peak=300))
    assert record.peak_allocated_bytes == 300
    spread = record.spread["peak_allocated_bytes"]
    assert (spread.max, spread.min, spread.mean, spread.rank) == (300, 100, 200, 1)
    assert record.peak_by_category_bytes == {"parameters": 300}
    assert record.peak_by_phase_bytes == {"forward": 1}
    assert record.collective_bytes == {"all_to_all": 11}


def test_step_time_is_the_median_of_the_slowest_ranks() -> None:
    """Each step takes as long as its slowest rank; the headline is the median, the samples stay."""
    record = record_of(rank(0, seconds=(1.0, 5.0, 1.0)), rank(1, seconds=(2.0, 1.0, 1.5)))
    assert record.step_seconds_samples == (2.0, 5.0, 1.5)
    assert record.step_seconds == 2.0


def test_rates_follow_from_step_time() -> None:
    """Tokens per second, per rank, and TFLOP/s by the stated convention; MFU only where the peak is known."""
    record = record_of(rank(0, seconds=(2.0,)), rank(1, seconds=(2.0,)))
    flops = fake_case("ok").architecture.step_flops(1024, 1)
    assert record.tokens_per_second == 512
    assert record.tokens_per_second_per_gpu == 256
    assert record.tflops_per_gpu == pytest.approx(flops / 2 / 2 / 1e12)
    assert record.mfu is None
    known = record_of(rank(0, seconds=(2.0,)), rank(1, seconds=(2.0,)), gpu=H100)
    assert known.mfu == pytest.approx(flops / 2 / 2 / 66.9e12)


def test_a_missing_number_is_null() -> None:
    """A quantity that one rank does not have is null, not zero; without samples there is no rate."""
    record = record_of(rank(0, peak=None, seconds=()), rank(1, seconds=()))
    assert record.peak_allocated_bytes is None
    assert "peak_allocated_bytes" not in record.spread
    assert record.step_seconds is None
    assert record.tokens_per_second is None


@pytest.mark.parametrize(
    ("ranks", "gpu", "phrase"),
    [
        ((rank(0), rank(1, losses=(7.0, None))), None, "loss of step 1 on rank 1 is not finite"),
        ((rank(0, grad_norms=(None, 1.0)), rank(1)), None, "gradient norm of step 0 on rank 0"),
        ((rank(0), rank(1, attention_backend="cudnn")), None, "different attention kernels"),
        ((rank(0),), None, "1 of 2 ranks"),
        ((rank(0, seconds=(1e-9,)), rank(1, seconds=(1e-9,))), H100, "above the hardware's peak"),
    ],
)
def test_what_cannot_be_true_is_invalid(ranks: tuple[RankReport, ...], gpu: str | None, phrase: str) -> None:
    """Numbers that cannot be true are kept but marked invalid, with the reason."""
    record = record_of(*ranks, gpu=gpu)
    assert record.status == "invalid"
    assert phrase in str(record.reason)


def test_another_kernel_than_asked_is_invalid() -> None:
    """A record made with another attention kernel than the one asked for does not pass for it."""
    case = fake_case("ok").model_copy(update={"attention_backend": "cudnn"})
    assert record_of(rank(0), rank(1), case=case).status == "invalid"


def test_an_unlikely_first_loss_is_a_warning() -> None:
    """A first loss far from the logarithm of the vocabulary is ok, with a doubt."""
    record = record_of(rank(0, losses=(50.0, 49.0)), rank(1, losses=(50.0, 49.0)))
    assert record.status == "ok"
    assert "far from ln" in record.warnings[0]


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    """Written and read back, a record is equal; the version comes first in the file; no temporary stays."""
    record = record_of(rank(0), rank(1))
    path = tmp_path / "case.json"
    write_record(record, path)
    assert read_record(path) == record
    assert next(iter(json.loads(path.read_text(encoding="utf-8")))) == "format_version"
    assert list(tmp_path.iterdir()) == [path]


@given(
    status=st.sampled_from(STATUSES),
    reason=st.text(),
    options=st.dictionaries(
        st.text(max_size=5), st.booleans() | st.integers() | st.text(max_size=5), max_size=3
    ),
)
def test_any_reason_survives(status: Status, reason: str, options: dict[str, Any]) -> None:
    """Whatever a log held, the record reads back equal."""
    case = fake_case("ok").model_copy(update={"options": options})
    record = Record.without_result(case, status, reason, FACTS)
    assert parse_record(json.loads(json.dumps(record.model_dump(mode="json"))), source="memory") == record


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_cannot_spell_are_refused(value: float) -> None:
    """NaN and infinity never enter a record."""
    with pytest.raises(ValidationError):
        StepSample(step_seconds=value, forward_seconds=0, backward_seconds=0, optimizer_seconds=0)


def test_a_newer_record_says_update(tmp_path: Path) -> None:
    """A record of a newer format is refused by name with what to do."""
    path = tmp_path / "case.json"
    path.write_text(json.dumps({"format_version": FORMAT_VERSION + 1, "new": 1}), encoding="utf-8")
    with pytest.raises(RecordTooNew, match="update cpbench"):
        read_record(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"a": 1}', '{"format_version": "1"}', '{"format_version": 1}']
)
def test_what_is_no_record_is_one_sentence(tmp_path: Path, text: str) -> None:
    """Empty, truncated, foreign and incomplete files are refused with the file's name."""
    path = tmp_path / "case.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=r"case\.json"):
        read_record(path)


def test_unreadable_files_are_one_sentence(tmp_path: Path) -> None:
    """A folder, a missing file and a file that is no text are refused alike."""
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "missing.json", binary):
        with pytest.raises(RecordError, match="cannot be read"):
            read_record(path)


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing fails, the file holds what it held, and no temporary file stays."""
    path = tmp_path / "file"
    write_text_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no"):
        write_text_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_flat_row_has_scalars_only() -> None:
    """A row for a table holds numbers and texts: split memory as columns, lists as JSON."""
    row = record_of(rank(0), rank(1, peak=300)).flat()
    assert row["category.parameters.bytes"] == 300
    assert row["collective.all_to_all.bytes"] == 11
    assert row["peak_allocated_bytes.rank"] == 1
    assert json.loads(row["step_seconds_samples"]) == [1.0, 2.0]
    assert all(value is None or isinstance(value, str | int | float | bool) for value in row.values())
