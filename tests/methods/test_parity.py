"""Every method against the reference in real processes, and planted faults that must be found."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpbench import registry
from cpbench.case import Dtype
from cpbench.verification import Verification, VerifyReport
from cpbench.verify import VerifyRequest, verify

METHODS = tuple(registry.method_files())
BROKEN = Path(__file__).parent / "broken"
OPTIONS = {
    "ring": ({}, {"layout_order": "contiguous"}),
    "upipe": ({}, {"stage_heads": 12}),
}
HYBRID = {"upipe": ({}, {"stage_heads": 12}, {"ring_degree": 2}, {"ring_degree": 2, "stage_heads": 6})}


def run(world_size: int, num_kv_heads: int, *, dtype: Dtype = "float32", batch_size: int = 1) -> VerifyReport:
    hybrid = world_size == 4 and num_kv_heads < 12 and dtype == "float32"
    options = (HYBRID if hybrid else OPTIONS) if world_size > 1 else {}
    return verify(
        VerifyRequest(
            methods=METHODS,
            options=options,
            world_size=world_size,
            num_heads=12,
            num_kv_heads=num_kv_heads,
            head_dim=16,
            hidden_dim=104,
            num_layers=2 if batch_size > 1 else 1,
            batch_size=batch_size,
            qk_norm=batch_size > 1,
            dtype=dtype,
        )
    )


def explain(report: VerifyReport) -> str:
    return "\n".join(f"{r.method} {r.options}: {r.verdict} {r.reason}" for r in report.results)


@pytest.mark.parametrize(("world_size", "num_kv_heads"), [(1, 12), (1, 3), (2, 12), (2, 1), (4, 12), (4, 1)])
@pytest.mark.slow
def test_every_method_equals_the_reference_in_float32(world_size: int, num_kv_heads: int) -> None:
    """MHA, GQA and fewer KV heads than ranks give the reference's output, gradients, losses and norms."""
    report = run(world_size, num_kv_heads)

    assert all(result.verdict == "pass" for result in report.results), explain(report)
    assert {result.method for result in report.results} == set(METHODS)


@pytest.mark.slow
def test_two_sequences_with_normalised_queries_equal_the_reference() -> None:
    """GQA in a batch of two with qk-norm, where tensors after an all-to-all are no plain views, passes too."""
    report = run(4, 6, batch_size=2)

    assert all(result.verdict == "pass" for result in report.results), explain(report)


@pytest.mark.slow
def test_bfloat16_errors_stay_near_those_of_ulysses() -> None:
    """No method's bfloat16 error is more than half above that of ulysses, and the baseline is stated."""
    report = run(4, 2, dtype="bfloat16")

    assert all(result.verdict == "pass" for result in report.results), explain(report)
    assert all(check.baseline is not None for check in report.results[0].checks if check.name == "out")


@pytest.mark.slow
def test_planted_faults_are_found() -> None:
    """Each broken method fails, by the check that its fault must show in, and the healthy one beside them passes."""
    files = sorted(BROKEN.glob("*.py"))
    names = [path.stem.replace("_", "-") for path in files]

    report = verify(
        VerifyRequest(
            methods=("ulysses", *names),
            num_heads=8,
            num_kv_heads=2,
            head_dim=16,
            hidden_dim=64,
            plugins=tuple(files),
        )
    )

    found = {result.method: result for result in report.results}
    assert found["ulysses"].verdict == "pass"
    assert {name: found[name].verdict for name in names} == dict.fromkeys(names, "fail"), explain(report)
    assert "causality" in failed(found["broken-causality"])
    assert failed(found["broken-replicas"]) >= {"dwk", "dwv"}
    assert "out" not in failed(found["broken-replicas"])
    assert "out" in failed(found["broken-rotation"])
    assert "out" in failed(found["broken-head-order"])


@pytest.mark.slow
def test_a_method_that_dies_is_blamed_alone(tmp_path: Path) -> None:
    """When a rank dies, that method gets verdict error with the signal, and the others are still verified."""
    plugin = tmp_path / "suicidal.py"
    plugin.write_text(SUICIDAL, encoding="utf-8")

    report = verify(
        VerifyRequest(methods=("ulysses", "suicidal"), world_size=2, plugins=(plugin,), timeout_seconds=120)
    )

    assert [result.verdict for result in report.results] == ["pass", "error"]
    assert "signal" in (report.results[1].reason or "")


def failed(result: Verification) -> set[str]:
    return {check.name for check in result.checks if not check.passed}


SUICIDAL = '''
"""A method whose second rank kills itself."""
import os
import signal
from dataclasses import dataclass

from methods.ulysses import Ulysses


@dataclass(frozen=True, kw_only=True)
class Suicidal(Ulysses):
    def attention(self, x, weights, ctx):
        if ctx.ulysses.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().attention(x, weights, ctx)


METHOD = Suicidal
'''
