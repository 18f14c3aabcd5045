"""Every method against the references in real processes, and planted faults that must be found."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cpbench import registry
from cpbench.selection import Selection, standard
from cpbench.shape import Shape, matrix
from cpbench.verification import STACKS_CHECKED, Verification, VerifyReport, title
from cpbench.verify import VerifyRequest, verify

METHODS = tuple(registry.method_files())
NOT_ON_CPU = {"torch-ring"}
BROKEN = {
    path.stem.replace("_", "-"): path for path in sorted((Path(__file__).parent / "broken").glob("*.py"))
}
FOUND_BY = {
    "broken-bias": {"dbv", "dbv (checkpoint)", "grad norm (plain)"},
    "broken-causality": {"causality", "causality (backward)", "out"},
    "broken-costs": {"sent (forward)", "sent (backward)"},
    "broken-fpdt-keys": {"dwk", "dx", "dwk (checkpoint)", "grad norm (plain)"},
    "broken-fpdt-order": {"out", "causality", "causality (backward)", "dwq", "loss (plain)"},
    "broken-head-order": {"out", "out (heads permuted)", "dwo (heads permuted)"},
    "broken-peak": {"peak (forward)", "peak (backward)"},
    "broken-recomputation": {"out (checkpoint)", "dx (attention saved)", "grad norm (long)"},
    "broken-replicas": {"dwk", "dwv", "dx (checkpoint)", "grad norm (plain)"},
    "broken-ring": {"out", "dx", "causality", "sent (forward)"},
    "broken-ring-home": {"dwk", "dwv", "peak (backward)", "sent (backward)", "grad norm (plain)"},
    "broken-rotation": {"out", "dwq", "loss (plain)", "grad norm (plain)"},
    "broken-usp-causality": {"out", "causality", "causality (backward)", "loss (plain)"},
}
"""Checks that must fail for a fault, among others."""
NOT_FOUND_BY = {
    "broken-bias": {"out", "dx", "dwv", "dbq", "dbk", "causality"},
    "broken-causality": {"out (heads permuted)"},
    "broken-costs": {"out", "dx", "peak (forward)", "grad norm (long)"},
    "broken-fpdt-keys": {"out", "dwq", "dwv", "causality", "loss (plain)"},
    "broken-peak": {"out", "dx", "sent (forward)", "sent (backward)", "grad norm (long)"},
    "broken-recomputation": {"out", "dx", "dwq", "grad norm (plain)"},
    "broken-replicas": {"out", "causality"},
    "broken-ring-home": {"out", "dwq", "causality", "sent (forward)"},
}
"""Checks that do not see a fault, so that what finds it is known."""


def run(selection: Selection, *methods: str, plugins: tuple[Path, ...] = ()) -> VerifyReport:
    return verify(VerifyRequest(methods=methods or METHODS, selection=selection, plugins=plugins))


def explain(report: VerifyReport) -> str:
    return "\n".join(f"{title(f.method, f.given)}: {f.verdict}: {f.reason}" for f in report.methods)


def assert_all_pass(report: VerifyReport, *, at_least: int = 1) -> None:
    """Every method passes at every shape that it supports, and that is no empty statement."""
    assert report.passed, explain(report)
    defaults = {f.method: f for f in report.methods if not f.given}
    assert set(defaults) == set(METHODS)
    assert {m for m, f in defaults.items() if f.verdict == "unsupported"} <= NOT_ON_CPU, explain(report)
    assert all(f.passed >= at_least for m, f in defaults.items() if m not in NOT_ON_CPU), explain(report)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_method_is_verified(name: str) -> None:
    """Each option of a method in the tree has another value than its default in one of the sets it declares."""
    method = registry.load(name, {})
    defaults = registry.resolved_options(method)
    declared = registry.verify_options(registry.require(name))

    changed = {key for options in declared for key, value in options.items() if value != defaults[key]}

    assert changed == {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]  # checked on load
    for options in declared:
        registry.load(name, options)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_method_passes_on_four_ranks() -> None:
    """Every shape of the matrix, every declared option set, every stack, and a shape drawn at random.

    Option sets run at the first shape and models train at the fourth, so that they do not multiply.  Peaks of the
    defaults are among the checks; those of the option sets are held against `costs` by other tests.
    """
    chosen = standard(4, ["float32"], random=1, seed=1)
    first, _, third, fourth = chosen.shapes[:4]
    report = run(
        dataclasses.replace(
            chosen,
            stacks={fourth: chosen.stacks[first]},
            counted=frozenset([third]),
            thorough=frozenset([first]),
        )
    )

    assert_all_pass(report, at_least=4)
    counted = [r for r in report.results if r.shape == third and r.verdict == "pass" and not r.given]
    assert len(counted) > 5
    for result in counted:
        assert result.peaks is not None, result.method
        assert result.peaks.stated_forward_bytes, result.method
        assert result.peaks.stated_backward_bytes, result.method
    trained = {c.name for r in report.results if r.method == "ulysses" for c in r.checks if c.kind == "loss"}
    assert trained == {f"loss ({stack})" for stack in STACKS_CHECKED}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_method_passes_on_eight_ranks() -> None:
    """GQA with fewer KV heads than ranks, heads that are no power of two or do not divide over eight ranks."""
    shapes = matrix(8)
    report = run(Selection(shapes=(shapes[1], *shapes[3:])))

    assert_all_pass(report)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_method_passes_on_few_ranks(world_size: int) -> None:
    """One rank, where nothing is exchanged, and two, there with every declared option set at one shape.

    The model trained here has normalised queries, grouped ones and two sequences.
    """
    shapes = matrix(world_size)
    thorough = frozenset(shapes[1:2] if world_size > 1 else ())
    report = run(Selection(shapes=shapes, stacks={shapes[0]: ("long",)}, thorough=thorough))

    assert_all_pass(report, at_least=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bfloat16_errors_stay_near_the_baseline() -> None:
    """No error is more than half above that of ulysses, or of single where ulysses cannot run; both are stated."""
    _, short, _, some, uneven = matrix(4, "bfloat16")
    shapes = (some, uneven, short)
    report = run(Selection(shapes=shapes, stacks={some: ("long",)}, thorough=frozenset([short])))

    assert_all_pass(report)
    ring = [r for r in report.results if r.method == "ring" and not r.given]
    assert len(ring) == 3
    for result in ring:
        compared = [c for c in result.checks if c.kind in ("out", "gradients", "loss", "grad norm")]
        assert all(c.baseline is not None and 0 < c.limit < 0.1 for c in compared)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_planted_faults_are_found() -> None:
    """Each broken method fails by the checks that its fault must show in, and the healthy ones beside them pass."""
    shape = Shape(head_dim=64, num_kv_heads=2, attention_bias=True)
    report = run(
        Selection(shapes=(shape,), stacks={shape: ("plain", "long")}, counted=frozenset([shape])),
        *("ulysses", "ring", *(name for name in BROKEN if name != "broken-precision")),
        plugins=tuple(path for name, path in BROKEN.items() if name != "broken-precision"),
    )

    found = {result.method: result for result in report.results}
    assert found.pop("ulysses").verdict == found.pop("ring").verdict == "pass", explain(report)
    assert {name: result.verdict for name, result in found.items()} == dict.fromkeys(found, "fail"), explain(
        report
    )
    for name, result in found.items():
        assert failed(result) >= FOUND_BY[name], name
        assert not failed(result) & NOT_FOUND_BY.get(name, set()), name
    assert set(FOUND_BY) == set(found)


@pytest.mark.slow
def test_a_loss_of_precision_is_found_in_bfloat16() -> None:
    """RoPE's angles in the compute dtype pass in float32 and fail in bfloat16."""
    shapes = tuple(
        Shape(world_size=2, head_dim=64, seq_len=52, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    report = run(Selection(shapes=shapes), "broken-precision", plugins=(BROKEN["broken-precision"],))

    assert [result.verdict for result in report.results] == ["pass", "fail"], explain(report)
    assert "out" in failed(report.results[1])
    assert "causality" not in failed(report.results[1])


@pytest.mark.slow
def test_a_method_that_dies_or_hangs_is_blamed_alone(tmp_path: Path) -> None:
    """A rank that kills itself, or fails while the others wait for it, is named, and the others are still verified."""
    plugins = []
    for name, fault in (
        ("dies", "os.kill(os.getpid(), signal.SIGKILL)"),
        ("fails", 'raise ValueError("no")'),
    ):
        plugins.append(tmp_path / f"{name}.py")
        plugins[-1].write_text(FAULTY.format(fault=fault), encoding="utf-8")
    shapes = (Shape(world_size=2, seq_len=12), Shape(world_size=2, seq_len=20))

    report = verify(
        VerifyRequest(
            methods=("dies", "fails", "ulysses"),
            selection=Selection(shapes=shapes),
            plugins=tuple(plugins),
            collective_seconds=10,
        )
    )

    found = {findings.method: findings for findings in report.methods}
    assert {name: f.verdict for name, f in found.items()} == {
        "dies": "error",
        "fails": "error",
        "ulysses": "pass",
    }
    assert "signal 9" in (found["dies"].reason or "")
    assert "rank 1: ValueError: no" in (found["fails"].reason or "")
    assert "not run" in (found["dies"].reason or "")
    assert found["ulysses"].passed == 2


def failed(result: Verification) -> set[str]:
    return {check.name for check in result.checks if not check.passed}


FAULTY = '''
"""Ulysses whose second rank does not get to the end."""
import os
import signal
from dataclasses import dataclass

from methods.ulysses import Ulysses


@dataclass(frozen=True, kw_only=True)
class Faulty(Ulysses):
    def attention(self, x, weights, ctx):
        if ctx.ulysses.rank == 1 and ctx.ulysses.handle.name() == "gloo":
            {fault}
        return super().attention(x, weights, ctx)


METHOD = Faulty
'''
