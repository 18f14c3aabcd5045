"""From scenario to plan: names, limits, and the process that resolves."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpbench import expand
from cpbench.case import Case, Device, Mode
from cpbench.errors import UnknownName, UsageError
from cpbench.expand import ResolvedCase, excess, plan_sweep, resolve_cases
from cpbench.machine import Gpu
from cpbench.scenario import Scenario, build_scenario
from tests.cpbench.workers.harness import fake_case


def scenario(**run: int) -> Scenario:
    sweep = {"method": ["single", "ring"], "model": "tiny", "seq_len": 1024, "world_size": [1, 2]}
    return build_scenario({"name": "test", "sweep": sweep, "run": {"device": "cpu", **run}})


def accept(cases: Sequence[Case], plugins: Sequence[Path]) -> list[ResolvedCase]:
    return [ResolvedCase(case=case) for case in cases]


def refuse(cases: Sequence[Case], plugins: Sequence[Path]) -> list[ResolvedCase]:
    return [ResolvedCase(case=case, unsupported="the method does not like it") for case in cases]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (Gpu(name="NVIDIA H100", memory_bytes=1),) * 2
    monkeypatch.setattr(expand, "visible_gpus", lambda: (gpus, "570"))


def answer(monkeypatch: pytest.MonkeyPatch, stdout: str, code: int = 0, stderr: str = "") -> None:
    done = SimpleNamespace(stdout=stdout, stderr=stderr, returncode=code)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)


def test_a_plan_has_the_chosen_mode() -> None:
    """The plan's scenario says measure on cpu, not auto, so that a resumed run means the same."""
    plan = plan_sweep(scenario(), resolver=accept)
    assert (plan.choice.mode, plan.choice.device) == ("measure", "cpu")
    assert (plan.scenario.run.mode, plan.scenario.run.device) == ("measure", "cpu")
    assert len(plan.cases) == 4


def test_unknown_methods_never_reach_the_resolver() -> None:
    """A method that does not exist, in the sweep or in the options, is refused before a process starts."""

    def explode(cases: Sequence[Case], plugins: Sequence[Path]) -> list[ResolvedCase]:
        raise AssertionError

    for raw in ({"sweep": {"method": "rng"}}, {"options": {"rng": {"x": 1}}}):
        with pytest.raises(UnknownName, match="did you mean 'ring'"):
            plan_sweep(build_scenario({"name": "test", **raw}), resolver=explode)


def test_a_sweep_in_which_nothing_can_run_is_refused() -> None:
    """If every case is unsupported, the request is wrong: every reason is listed."""
    with pytest.raises(UsageError) as caught:
        plan_sweep(scenario(), resolver=refuse)
    assert str(caught.value).count("the method does not like it") == 4


def test_some_unsupported_cases_are_results() -> None:
    """If some cases can run, the others stay in the plan with their reason."""
    plan = plan_sweep(scenario(), resolver=lambda cases, _: [*accept(cases[:1], ()), *refuse(cases[1:], ())])
    assert [item.unsupported is None for item in plan.cases] == [True, False, False, False]


def test_cases_that_resolve_alike_run_once() -> None:
    """Two requests that mean the same resolved case give one case."""
    plan = plan_sweep(
        scenario(), resolver=lambda cases, _: [ResolvedCase(case=fake_case("ok")) for _ in cases]
    )
    assert len(plan.cases) == 1


@pytest.mark.usefixtures("two_gpus")
def test_more_ranks_than_gpus_is_unsupported() -> None:
    """On GPUs a measured case needs one device a rank; the message says how many there are and what else to do."""
    raw = {
        "name": "test",
        "sweep": {"method": "ring", "model": "tiny", "world_size": [2, 4]},
        "run": {"mode": "measure"},
    }
    plan = plan_sweep(build_scenario(raw), resolver=accept)
    fits, too_many = plan.cases
    assert fits.unsupported is None
    assert "4 visible GPUs" in str(too_many.unsupported)
    assert "--mode estimate" in str(too_many.unsupported)
    assert "--mode emulate" in str(too_many.unsupported)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"world_size": 2}, None),
        ({"world_size": 4}, "allows 2"),
        ({"world_size": 4, "nodes": 2}, None),
        ({"world_size": 5, "nodes": 2}, "does not divide over 2 nodes"),
        ({"world_size": 64, "mode": "estimate"}, None),
        ({"world_size": 64, "mode": "emulate"}, None),
        ({"world_size": 16, "mode": "estimate", "hardware": "h100-80g", "nodes": 2}, None),
        ({"world_size": 16, "mode": "estimate", "hardware": "h100-80g"}, "give --nodes 2 or more"),
        ({"world_size": 16, "mode": "emulate", "hardware": "rtx-4090", "nodes": 2}, "8 ranks a node"),
        ({"world_size": 10_000, "device": "cpu"}, "processes per node"),
        ({"world_size": 32, "device": "cpu"}, None),
    ],
)
def test_limits_of_the_machine(change: dict[str, Any], phrase: str | None) -> None:
    """Only measured cases are limited: by GPUs, or by a generous number of CPU processes, each per node."""
    case = fake_case("ok").model_copy(update={"device": "cuda"} | change)
    found = excess(case, gpus=2)
    assert (found is None) if phrase is None else (phrase in str(found))


@pytest.mark.parametrize(("device", "elsewhere"), [("cuda", None), ("cpu", 0), ("cuda", 1)])
def test_one_gpu_is_enough_to_emulate_and_a_processor_needs_none(device: str, elsewhere: int | None) -> None:
    """Only an emulation on GPUs, on a machine known to have none, is unsupported."""
    case = fake_case("ok").model_copy(update={"mode": "emulate", "device": device})

    assert excess(case, gpus=elsewhere) is None


def test_nodes_are_those_that_the_ranks_fill_where_none_run() -> None:
    """An estimate for GPUs says its nodes; one for CPU processes, and a measured case, are on one unless told."""
    raw = {"name": "test", "sweep": {"method": "ring", "model": "tiny", "world_size": [8, 32]}}

    def nodes(mode: Mode, device: Device, **run: object) -> list[int]:
        return [case.nodes for case in build_scenario({**raw, "run": run}).expand(mode=mode, device=device)]

    assert nodes("estimate", "cuda") == nodes("emulate", "cuda") == [1, 4]
    assert nodes("estimate", "cuda", hardware="rtx-4090") == [2, 8]
    assert nodes("estimate", "cpu") == nodes("measure", "cuda") == [1, 1]
    assert nodes("estimate", "cuda", nodes=2) == [2, 2]


def test_errors_of_the_resolver_are_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the measured half says about an option reaches the user word for word."""
    answer(monkeypatch, '{"error": "ring has no option foo"}', code=2)
    with pytest.raises(UsageError, match="ring has no option foo"):
        resolve_cases([fake_case("ok")], [])


@pytest.mark.parametrize("stdout", ["", "Traceback", "[]", '{"cases": []}'])
def test_a_resolver_without_an_answer_is_a_defect(monkeypatch: pytest.MonkeyPatch, stdout: str) -> None:
    """A resolving process that dies silently is our defect, shown with the end of its errors."""
    answer(monkeypatch, stdout, code=1, stderr="first\nImportError: libtorch is gone")
    with pytest.raises(RuntimeError, match="libtorch is gone"):
        resolve_cases([fake_case("ok")], [])


def test_real_methods_fill_in_their_options() -> None:
    """The real resolver gives options, degrees and the source hash of a built-in method."""
    case = fake_case("ok").model_copy(update={"method": "ring", "options": {}})
    (found,) = resolve_cases([case], [])
    assert found.unsupported is None
    assert found.case.options
    assert found.case.ring_degree == 2
    assert found.method_source_hash
