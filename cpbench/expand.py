"""From a scenario to the cases of a sweep: names checked, mode chosen, cases resolved, limits applied.

Methods run only in the measured half, so `cpbench.resolve` does the resolving in a process of its own: JSON
in on standard input, JSON out on standard output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cpbench import registry
from cpbench.case import Case, Device
from cpbench.errors import UnknownName, UsageError, without_name
from cpbench.hardware import load_hardware
from cpbench.launch import child_environment
from cpbench.machine import usable_cpus, visible_gpus
from cpbench.mode import ModeChoice, choose_mode
from cpbench.scenario import Scenario

_RESOLVE_SECONDS = 600.0  # a method's file may import and build kernels


class ResolvedCase(BaseModel):
    """A case as the measured half sees it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: Case
    """With every option and both degrees filled in."""
    unsupported: str | None = None
    """Why the method, or this machine, cannot run it."""
    method_source_hash: str | None = None


Resolver = Callable[[Sequence[Case], Sequence[Path]], list[ResolvedCase]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a sweep is going to do."""

    scenario: Scenario
    """Mode and device are those chosen, no longer `auto`."""
    choice: ModeChoice
    cases: tuple[ResolvedCase, ...]
    """In the order they run; ids are distinct."""
    plugins: tuple[Path, ...] = ()


def plan_sweep(
    scenario: Scenario,
    *,
    plugins: Sequence[Path] = (),
    resolver: Resolver | None = None,
    elsewhere: bool = False,
) -> Plan:
    """Return the plan of a sweep; nothing is launched or written.

    Args:
        scenario: with command-line flags already applied.
        plugins: files of further methods.
        resolver: stands in for `resolve_cases` in tests.
        elsewhere: other machines run it, so the devices of this one set no limit.

    Raises:
        UsageError: a name or option is wrong, or no requested case can run here (with every reason).
    """
    plugins = tuple(path.absolute() for path in plugins)
    for name in dict.fromkeys((*scenario.sweep.method, *scenario.options)):
        registry.require(name, plugins)
    known = registry.method_files(plugins)
    for name in (name for rule in scenario.exclude for name in rule.method or ()):
        if name not in known:
            raise UnknownName("method of an [[exclude]] rule", name, known)
    gpus = len(visible_gpus()[0])
    choice = chosen_mode(scenario)
    run = scenario.run.model_copy(update={"mode": choice.mode, "device": choice.device})
    load_hardware(scenario.run.hardware)
    requested = scenario.expand(mode=choice.mode, device=choice.device)
    resolved = (resolver or resolve_cases)(requested, plugins)
    limit = None if elsewhere else gpus
    limited = [
        item if item.unsupported else item.model_copy(update={"unsupported": excess(item.case, gpus=limit)})
        for item in resolved
    ]
    cases = tuple({item.case.case_id: item for item in limited}.values())
    if all(item.unsupported for item in cases):
        lines = dict.fromkeys(
            f"{item.case.title}: {without_name(str(item.unsupported), item.case.method)}" for item in cases
        )
        raise UsageError("none of the requested cases can run:\n  " + "\n  ".join(lines))
    return Plan(
        scenario=scenario.model_copy(update={"run": run}), choice=choice, cases=cases, plugins=plugins
    )


def chosen_mode(scenario: Scenario) -> ModeChoice:
    """Return the mode and device that a scenario means on this machine."""
    nodes = scenario.run.nodes or 1
    local = max(-(-world // nodes) for world in scenario.sweep.world_size)
    gpus = len(visible_gpus()[0])
    return choose_mode(scenario.run.mode, scenario.run.device, world_size=local, gpus=gpus)


def resolve_cases(cases: Sequence[Case], plugins: Sequence[Path]) -> list[ResolvedCase]:
    """Let the methods fill in options and degrees and say what they cannot run.

    Raises:
        UsageError: an option is unknown or has the wrong type, or a method's file is broken.
        RuntimeError: the resolving process failed without saying why; a defect of cpbench.
    """
    request = {
        "cases": [case.model_dump(mode="json") for case in cases],
        "plugins": [str(path) for path in plugins],
    }
    done = subprocess.run(
        [sys.executable, "-m", "cpbench.resolve"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=child_environment(None, single_node=True),
        timeout=_RESOLVE_SECONDS,
        check=False,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and "error" in answer:
        raise UsageError(str(answer["error"]))
    if done.returncode != 0 or not isinstance(answer, dict) or len(answer.get("cases", ())) != len(cases):
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise RuntimeError(f"cpbench.resolve ended with code {done.returncode} and no answer:\n{tail}")
    return [ResolvedCase.model_validate(item) for item in answer["cases"]]


def cpu_process_limit() -> int:
    """Return the most processes a measured case may have on this machine's cores."""
    return max(32, 8 * usable_cpus())


def excess(case: Case, *, gpus: int | None) -> str | None:
    """Return why a case has more ranks than there are devices, here or on a node of its machine profile, or None.

    Args:
        case: a resolved case.
        gpus: visible GPUs of this machine; None when another machine runs the case, with devices of its own.
    """
    if case.mode != "measure":
        return _no_gpu(case, gpus) or _too_full(case)
    if case.world_size % case.nodes:
        return f"world_size={case.world_size} does not divide over {case.nodes} nodes; choose a multiple"
    if gpus is None:
        return None
    local = case.world_size // case.nodes
    limit, kind = _devices(case.device, gpus)
    if local <= limit:
        return None
    return (
        f"world_size={case.world_size} needs {local} {kind} per node in measure mode, but this machine "
        f"allows {limit}; lower --world, add --nodes, or use --mode emulate or --mode estimate"
    )


def _no_gpu(case: Case, gpus: int | None) -> str | None:
    if case.mode != "emulate" or case.device != "cuda" or gpus != 0:
        return None
    return (
        "an emulated case runs on one visible GPU, but this machine has none; "
        "use --device cpu, or --mode estimate"
    )


def _too_full(case: Case) -> str | None:
    if case.hardware is None:
        return None
    size, local = load_hardware(case.hardware).gpus_per_node, -(-case.world_size // case.nodes)
    if local <= size:
        return None
    return (
        f"world_size={case.world_size} on nodes={case.nodes} is {local} ranks a node, but a node of {case.hardware} "
        f"has {size} GPUs; give --nodes {-(-case.world_size // size)} or more, or leave it out"
    )


def _devices(device: Device, gpus: int) -> tuple[int, str]:
    return (gpus, "visible GPUs") if device == "cuda" else (cpu_process_limit(), "processes")


__all__ = [
    "Plan",
    "ResolvedCase",
    "Resolver",
    "chosen_mode",
    "cpu_process_limit",
    "excess",
    "plan_sweep",
    "resolve_cases",
]
