"""Estimates, and the records that come of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cpbench import registry
from cpbench.case import STACKS, Case
from cpbench.cli import app
from cpbench.model_config import ModelConfig
from cpbench.record import read_record
from cpbench.resolve import resolve
from cpbench.world.estimate import estimate_case


def case(method: str, stack: str, *, layers: int = 8, seq_len: int = 16_384, device: str = "cuda") -> Case:
    model = ModelConfig(
        hidden_dim=256,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        ffn_dim=688,
        vocab_size=1021,
    )
    requested = Case.model_validate(
        {
            "method": method,
            "model": "deep",
            "architecture": model,
            "seq_len": seq_len,
            "world_size": 4,
            "stack": STACKS[stack],
            "mode": "estimate",
            "device": device,
            "dtype": "float32" if device == "cpu" else "bfloat16",
        }
    )
    resolved, unsupported = resolve(requested, [])
    assert unsupported is None
    return resolved


@pytest.mark.slow
def test_tiling_and_offload_lower_the_peak() -> None:
    """At a length where activations dominate, each stack preset needs less than the one before it."""
    peaks = []
    for stack in ("plain", "checkpoint", "long"):
        c = case("ulysses", stack, layers=4)
        peaks.append(
            estimate_case(c, registry.load(c.method, c.options)).ranks[0].memory.peak_allocated_bytes or 0
        )

    assert peaks[0] > peaks[1] > peaks[2] > 0


@pytest.mark.slow
def test_an_estimate_for_cpu_processes_has_no_time() -> None:
    """There is no profile of a CPU, so nothing stands in for its step time."""
    c = case("ulysses", "plain", layers=1, device="cpu")
    report = estimate_case(c, registry.load(c.method, c.options)).ranks[0]

    assert report.samples == ()
    assert report.modelled is None


@pytest.mark.slow
def test_a_sweep_without_gpus_answers_by_estimate(tmp_path: Path) -> None:
    """Cases that fit are ok and those that do not say what is short; every record says it is an estimate."""
    result = CliRunner().invoke(
        app,
        [
            *("sweep", "--method", "upipe", "--model", "tiny", "--seqlen", "64K,256M"),
            *("--mode", "estimate"),
            *("--hardware", "rtx-4090", "--world", "4", "--runs", str(tmp_path), "--name", "laptop"),
        ],
    )

    assert result.exit_code == 0, result.output
    assert "estimate" in result.output
    records = [read_record(path) for path in sorted((tmp_path / "laptop" / "cases").glob("*.json"))]
    assert {record.seq_len: record.status for record in records} == {2**16: "ok", 2**28: "oom_device"}
    for record in records:
        assert record.mode == "estimate"
        assert record.hardware == "rtx-4090"
        assert record.modelled is not None
        assert record.modelled.uncertainty == 0.4  # as the profile says
        parts = (record.forward_seconds, record.backward_seconds, record.optimizer_seconds)
        assert record.step_seconds == pytest.approx(sum(part or 0 for part in parts))
        assert sum(record.modelled.critical_path_seconds.values()) == pytest.approx(record.step_seconds)
        assert 0 < (record.mfu or 0) < 1
        assert (record.device_needed_bytes or 0) > 1.03 * (record.peak_allocated_bytes or 0) > 0
        assert (record.host_needed_bytes or 0) > 4 * (record.host_pinned_peak_bytes or 0) > 0
    raw = json.loads(next((tmp_path / "laptop" / "cases").glob("*256M*.json")).read_text(encoding="utf-8"))
    assert "short by" in raw["reason"]
