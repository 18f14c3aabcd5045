"""What one H100 measured is what an estimate says today; what docs/estimate.md says of it is what the records give."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from cpbench import registry
from cpbench.explain import cases_of_run
from cpbench.kernel_finding import KernelFindings
from cpbench.rank_report import RankReport
from cpbench.rate_probe import RateProbes
from cpbench.record import Record, read_record
from cpbench.units import format_bytes, format_length, format_seconds
from cpbench.verification import VerifyReport
from cpbench.world.estimate import estimate_case

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "estimate.md").read_text(encoding="utf-8")
H100 = ROOT / "results" / "1x-h100-80gb-hbm3"
ROUNDED = 0.0001
"""The allocator rounds each block up, which an estimate does not."""
RECORDS = [read_record(path) for path in sorted(H100.glob("*/cases/*.json"))]
RAN = [record for record in RECORDS if record.status == "ok"]


def name(record: Record) -> str:
    return f"{record.mode}-{record.method}-{format_length(record.seq_len)}"


@cache
def estimated(case_id: str) -> RankReport:
    """The estimate of what a record ran, of the same rank, made now."""
    folder = next(path.parents[1] for path in H100.glob(f"*/cases/{case_id}.json"))
    ((case,), _) = cases_of_run(folder, [case_id])
    rank = case.rank or 0
    asked = case.model_copy(update={"mode": "estimate", "hardware": "h100-80g", "rank": rank})
    (report,) = estimate_case(asked, registry.load(case.method, case.options), rank=rank).ranks
    return report


@pytest.mark.slow
@pytest.mark.parametrize("record", RAN, ids=name)
def test_the_estimate_is_what_the_gpu_allocated(record: Record) -> None:
    """Peak, its split by category, attention's own peaks and collectives."""
    memory = estimated(record.case_id).memory
    assert record.peak_allocated_bytes is not None
    assert memory.peak_allocated_bytes == pytest.approx(record.peak_allocated_bytes, rel=ROUNDED)
    assert memory.host_pinned_peak_bytes == record.host_pinned_peak_bytes
    for found, wanted in (
        (memory.attention_forward_peak_bytes, record.attention_forward_peak_bytes),
        (memory.attention_backward_peak_bytes, record.attention_backward_peak_bytes),
    ):
        assert found == pytest.approx(wanted, rel=0.001)
    assert record.peak_by_category_bytes == pytest.approx(memory.peak_by_category_bytes, rel=0.001)
    if record.mode == "emulate":
        assert record.collective_bytes == estimated(record.case_id).collective_bytes


@pytest.mark.slow
def test_the_table_of_the_page() -> None:
    """Each row: peak measured and estimated, compute measured and modelled."""
    for record in RAN:
        if record.mode != "emulate":
            continue
        report = estimated(record.case_id)
        (sample,), modelled = report.samples, report.modelled
        assert modelled is not None
        assert record.compute_seconds is not None
        compute = sample.step_seconds - modelled.exposed_communication_seconds
        row = (
            f"| `{record.method}` {format_length(record.seq_len)} | {record.architecture.num_layers}, "
            f"`{'plain' if record.checkpoint == 'none' else 'long'}` | "
            f"{record.peak_allocated_bytes:,} | {report.memory.peak_allocated_bytes:,} | "
            f"{format_seconds(record.compute_seconds)} | {format_seconds(compute)} | "
            f"{compute / record.compute_seconds:.2f} |"
        )
        assert row in PAGE


def test_what_did_not_fit_is_on_the_page() -> None:
    """One case ended in an out-of-memory error of the device, with the reason."""
    (record,) = (record for record in RECORDS if record.status != "ok")
    assert record.status == "oom_device"
    assert "CUDA out of memory" in str(record.reason)
    assert f"{format_length(record.seq_len)} ended" in PAGE


def test_everything_was_verified_on_the_gpu() -> None:
    """Every method and option set, ranks as processes that share the device; and both kernels."""
    report = VerifyReport.model_validate_json((H100 / "verify.json").read_bytes())
    assert report.shared_gpu
    assert {found.method for found in report.methods} == set(registry.method_files())
    assert {found.verdict for found in report.methods} == {"pass"}
    kernels = KernelFindings.validate_json((H100 / "kernels.json").read_bytes())
    assert {finding.kernel for finding in kernels} == {"cuda-flash", "cudnn"}
    assert all(finding.passed for finding in kernels)


def test_rates_of_the_page() -> None:
    """Page-locking, the copies and the range of model over measured."""
    probes = RateProbes.validate_json((H100 / "rates.json").read_bytes())
    for probe in probes:
        if probe.name in ("page-lock", "copy_in", "copy_out", "copy on device"):
            assert probe.rate in PAGE
    ratios = [
        p.modelled_seconds / p.seconds for p in probes if p.modelled_seconds and "cuda-flash" in p.shape
    ]
    assert f"{min(ratios):.2f} to {max(ratios):.2f}" in PAGE
    for probe in probes:
        if probe.inner_bytes is not None and probe.stated_inner_bytes:
            assert probe.stated_inner_bytes == pytest.approx(probe.inner_bytes, rel=0.002), probe.line
    assert format_bytes(RAN[0].non_torch_bytes) in PAGE
