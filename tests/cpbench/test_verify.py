"""What is verified, what a launch that ends early leaves, and how verdicts add up."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from math import gcd
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cpbench import registry
from cpbench.case import Case, Device
from cpbench.cli.verify_table import print_report
from cpbench.errors import UsageError
from cpbench.expand import ResolvedCase
from cpbench.launch import Exit, Job
from cpbench.outcome import Outcome
from cpbench.selection import Selection, full, one_shape, quick, standard
from cpbench.shape import Shape, matrix, random_shapes
from cpbench.verification import (
    STACKS_CHECKED,
    Check,
    Verdict,
    Verification,
    VerifyAnswer,
    VerifyItem,
    VerifyReport,
)
from cpbench.verify import VerifyRequest, verify

PLUGIN = '''
"""A method."""
VERIFY_OPTIONS = ({"chunk": 8}, {"chunk": 16, "lean": True})
'''
A, B = Shape(seq_len=8), Shape(seq_len=16)


@given(world_size=st.integers(1, 16))
def test_the_matrix_covers_what_it_promises(world_size: int) -> None:
    """MHA, 4:1, 8:1, few KV heads, head counts that are no power of two, both widths, batches, lengths; biases."""
    shapes = matrix(world_size)
    ratios = {shape.num_heads // shape.num_kv_heads for shape in shapes}

    assert {1, 4} <= ratios
    assert max(ratios) >= 8
    assert any(shape.num_heads & (shape.num_heads - 1) for shape in shapes)
    assert {64, 128} == {shape.head_dim for shape in shapes}
    assert {1, 2} == {shape.batch_size for shape in shapes}
    assert min(shape.seq_len for shape in shapes) == 2 * world_size
    assert all(shape.seq_len % (2 * world_size) == 0 for shape in shapes)
    assert {(shape.qk_norm, shape.attention_bias) for shape in shapes} == {
        (True, True),
        (False, True),
        (False, False),
    }
    if world_size > 1:
        assert any(shape.num_kv_heads < world_size for shape in shapes)
        assert any(shape.num_heads % world_size for shape in shapes)
        assert sum(shape.num_heads % world_size == 0 for shape in shapes) >= 3
    assert all(shape.architecture() for shape in shapes)


def test_random_shapes_follow_their_seed() -> None:
    """The same seed draws the same shapes, another one others; every second has heads that divide over the ranks."""
    first = random_shapes(4, 8, 1, ["float32", "bfloat16"])

    assert first == random_shapes(4, 8, 1, ["float32", "bfloat16"])
    assert first != random_shapes(4, 8, 2, ["float32", "bfloat16"])
    assert len(first) == 16
    assert all(shape.num_heads % gcd(4, shape.num_heads) == 0 for shape in first)
    assert sum(shape.num_heads % 4 == 0 for shape in first) >= 8
    assert all(shape.architecture() for shape in first)


def test_selections_grow() -> None:
    """Quick is one shape; standard adds shapes and stacks; full adds dtypes, option sets and random shapes."""
    small, usual = quick(4, ["float32"]), standard(4, ["float32"])
    everything = full(4, ["float32", "bfloat16"])

    assert len(small.shapes) == 1
    assert set(small.shapes) < set(usual.shapes) < set(everything.shapes)
    assert usual.thorough < everything.thorough == set(everything.shapes)
    assert set(usual.stacks[usual.shapes[0]]) == set(STACKS_CHECKED)
    assert {shape.dtype for shape in everything.shapes} == {"float32", "bfloat16"}


def test_a_method_declares_what_to_verify(tmp_path: Path) -> None:
    """The defaults come first, then the sets of VERIFY_OPTIONS, read without running the file."""
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN + "raise RuntimeError", encoding="utf-8")

    assert registry.verify_options(plugin) == ({}, {"chunk": 8}, {"chunk": 16, "lean": True})


def test_a_declaration_must_be_literal(tmp_path: Path) -> None:
    """What would have to be run is refused with what is allowed."""
    plugin = tmp_path / "mine.py"
    plugin.write_text("VERIFY_OPTIONS = tuple({'chunk': n} for n in (8, 16))", encoding="utf-8")

    with pytest.raises(UsageError, match="must be a literal tuple of option sets"):
        registry.verify_options(plugin)


def test_declared_sets_run_at_thorough_shapes_only(tmp_path: Path) -> None:
    """Elsewhere a method runs with its defaults; sets given by the user replace the declared ones everywhere."""
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN, encoding="utf-8")
    selection = Selection(shapes=(A, B), stacks={A: ("plain", "long")}, thorough=frozenset([A]))
    declared = VerifyRequest(methods=("mine",), selection=selection, plugins=(plugin,))
    given_ = VerifyRequest(
        methods=("mine",), selection=selection, plugins=(plugin,), options={"mine": [{"chunk": 4}]}
    )

    assert [(i.given, i.case.seq_len, i.stacks) for i in declared.items()] == [
        ({}, 8, ("plain", "long")),
        ({"chunk": 8}, 8, ("long",)),
        ({"chunk": 16, "lean": True}, 8, ("long",)),
        ({}, 16, ()),
    ]
    assert [(i.given, i.case.seq_len) for i in given_.items()] == [({"chunk": 4}, 8), ({"chunk": 4}, 16)]


def test_single_runs_every_shape_on_one_rank() -> None:
    """The reference stands beside the methods at the same length."""
    request = VerifyRequest(methods=("single", "ring"), selection=one_shape([A]))

    assert [item.case.world_size for item in request.items() if not item.given] == [1, 4]


@pytest.mark.parametrize(
    ("verdicts", "expected", "passed"),
    [
        (("pass", "unsupported"), "pass", True),
        (("unsupported", "unsupported"), "unsupported", True),
        (("pass", "fail"), "fail", False),
        (("fail", "error", "pass"), "error", False),
    ],
)
def test_verdicts_of_shapes_add_up(verdicts: Sequence[Verdict], expected: str, passed: bool) -> None:
    """The worst shape decides; one that is not supported counts only if none is."""
    results = [
        Verification(method="mine", shape=Shape(seq_len=8 * k), verdict=v, reason=f"because {k}")
        for k, v in enumerate(verdicts, start=1)
    ]

    report = VerifyReport.of("cpu", results)

    assert report.methods[0].verdict == expected
    assert report.passed is passed
    assert report.methods[0].supported == sum(v != "unsupported" for v in verdicts)


class FakeLaunches:
    """Stands in for processes: what each launch answers, and how it ends."""

    def __init__(self, *scripts: tuple[int, int]) -> None:
        self.scripts = list(scripts)
        """For each launch (answers that it gives, exit code)."""
        self.jobs: list[list[str]] = []

    def __call__(self, job: Job, *, should_stop: object, on_wait: Callable[[], None]) -> Exit:
        job.folder.mkdir(parents=True)
        items = [VerifyItem.model_validate(item) for item in job.extra["items"]]  # type: ignore[attr-defined]
        self.jobs.append([f"{item.case.method}@{item.case.seq_len}" for item in items])
        answers, code = self.scripts.pop(0)
        with (job.folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            for index, item in enumerate(items[:answers]):
                result = Verification(method=item.case.method, shape=Shape.of(item.case), verdict="pass")
                file.write(VerifyAnswer(index=index, result=result).model_dump_json() + "\n")
            file.write('{"index": 99, "resu')  # half a line
        on_wait()
        phase = {"phase": "ring at ...", "done": answers, "total": len(items), "time": 0.0}
        if answers or code == 0:
            (job.folder / "progress.json").write_text(json.dumps(phase), encoding="utf-8")
        return Exit(code=code, timed_out=False, interrupted=False, duration_seconds=1.0)


def report_with(
    launches: FakeLaunches, monkeypatch: pytest.MonkeyPatch, device: Device = "cpu", gpus: int = 0
) -> VerifyReport:
    def resolve(cases: Sequence[Case], plugins: Sequence[Path]) -> list[ResolvedCase]:
        return [ResolvedCase(case=case) for case in cases]

    monkeypatch.setattr("cpbench.verify.launch", launches)
    monkeypatch.setattr("cpbench.verify.resolve_cases", resolve)
    monkeypatch.setattr("cpbench.verify.visible_gpus", lambda: (("a GPU",) * gpus, None))
    monkeypatch.setattr("cpbench.verify.explain", lambda *_, **__: Outcome(status="error", reason="it died"))
    selection = Selection(shapes=(A, B))
    return verify(VerifyRequest(methods=("ring", "ulysses"), selection=selection, device=device))


def verify_with(launches: FakeLaunches, monkeypatch: pytest.MonkeyPatch) -> dict[str, Verification]:
    report = report_with(launches, monkeypatch)
    return {f"{r.method}@{r.shape.seq_len}": r for r in report.results}


def test_one_launch_is_enough_when_nothing_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """All methods and shapes share the processes."""
    launches = FakeLaunches((4, 0))

    found = verify_with(launches, monkeypatch)

    assert launches.jobs == [["ring@8", "ulysses@8", "ring@16", "ulysses@16"]]
    assert {r.verdict for r in found.values()} == {"pass"}


def test_the_case_that_ran_is_blamed_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found is kept, the method that broke the launch is not run again, others are."""
    launches = FakeLaunches((1, 1), (1, 0))

    found = verify_with(launches, monkeypatch)

    assert launches.jobs[1] == ["ring@16"]
    assert {name: r.verdict for name, r in found.items()} == {
        "ring@8": "pass",
        "ring@16": "pass",
        "ulysses@8": "error",
        "ulysses@16": "error",
    }
    assert found["ulysses@8"].reason == "it died"
    assert "not run" in (found["ulysses@16"].reason or "")


def test_nothing_is_blamed_alone_when_no_case_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that cannot even start are no method's fault, and are not started again for each."""
    launches = FakeLaunches((0, 1))

    found = verify_with(launches, monkeypatch)

    assert len(launches.jobs) == 1
    assert {r.reason for r in found.values()} == {"it died"}
    assert {r.verdict for r in found.values()} == {"error"}


@pytest.mark.parametrize(("gpus", "shared"), [(1, True), (3, True), (4, False)])
def test_fewer_gpus_than_ranks_are_shared(gpus: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks are launched all the same; the report, and the line over the table, say where they ran."""
    launches = FakeLaunches((4, 0))

    report = report_with(launches, monkeypatch, "cuda", gpus)

    assert len(launches.jobs[0]) == 4
    assert (report.device, report.shared_gpu, report.passed) == ("cuda", shared, True)
    console = Console(file=io.StringIO(), width=120)
    print_report(report, console)
    heading = console.file.getvalue().splitlines()[0]  # type: ignore[attr-defined]  # the StringIO above
    assert ("4 ranks on one GPU, exchanging through host memory" in heading) == shared
    assert heading.endswith("4 ranks on cuda") != shared


def test_without_a_gpu_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched, and the reason has both numbers; on CPU the same is launched."""
    launches = FakeLaunches((4, 0))

    with pytest.raises(UsageError, match=r"needs 4 visible GPUs.*allows 0"):
        report_with(launches, monkeypatch, "cuda", 0)

    assert launches.jobs == []
    assert not report_with(launches, monkeypatch, "cpu", 0).shared_gpu


def test_one_rank_shares_with_no_one() -> None:
    """A report of `single` alone on a machine with one GPU; with four ranks beside it, it is shared."""
    alone = Verification(method="single", shape=Shape(world_size=1), verdict="pass")
    four = Verification(method="ring", shape=Shape(world_size=4), verdict="pass")

    assert not VerifyReport.of("cuda", [alone], gpus=1).shared_gpu
    assert VerifyReport.of("cuda", [alone, four], gpus=1).shared_gpu
    assert not VerifyReport.of("cpu", [alone, four], gpus=1).shared_gpu


def test_a_check_without_a_number_is_not_passed() -> None:
    """An error that was not finite is None, and JSON can carry it."""
    check = Check(kind="out", name="out", error=None, limit=1e-5, passed=False)

    assert json.loads(check.model_dump_json())["error"] is None
