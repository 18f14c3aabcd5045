"""What the flags of `cpbench sweep` ask for: the command line as one object, and the plan it means."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cpbench import registry, slurm
from cpbench.durations import too_short
from cpbench.errors import UsageError
from cpbench.expand import Plan, chosen_mode, plan_sweep
from cpbench.folders import scenario_folders
from cpbench.hardware import load_hardware
from cpbench.launch import Nodes
from cpbench.run_folder import RunFolder, checked_name
from cpbench.scenario import Scenario, build_scenario, load_scenario


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRequest:
    """The command line, checked flag by flag."""

    scenario: str | None
    axes: dict[str, Any]
    run: dict[str, Any]
    options: dict[str, Any]
    stack: dict[str, Any]
    plugins: tuple[Path, ...]
    name: str | None
    runs: Path
    resume: bool
    node_rank: int
    endpoint: str | None
    slurm: bool
    sbatch: tuple[str, ...]

    @property
    def says_what(self) -> bool:
        """Whether any flag describes cases, as opposed to naming a run to resume."""
        shaping = {key for key in self.run if key != "timeout_seconds"}
        return bool(self.scenario or self.axes or shaping or self.options or self.stack or self.plugins)


def plan_request(
    request: SweepRequest, *, parsed: Callable[[Scenario], None] = lambda _: None
) -> tuple[Plan, Nodes]:
    """Return the plan that a command line asks for, and this machine's place among the nodes.

    Args:
        request: the flags.
        parsed: told the scenario before its cases are resolved, which takes some seconds.

    Raises:
        UsageError: flags that do not go together, or a plan in which nothing can run.
    """
    plugins = request.plugins
    if request.resume and request.name is None:
        raise UsageError("--resume needs --name RUN, the run to continue")
    if request.resume and not request.says_what:
        info = RunFolder(request.runs / checked_name(str(request.name))).read_info()
        base, plugins = info.scenario, tuple(Path(path) for path in info.plugins)
    elif request.scenario is not None:
        base = load_scenario(request.scenario, folders=scenario_folders())
    else:
        base = Scenario()
    idle = base.idle_rules()
    scenario = _with_flags(base, request)
    if request.slurm:
        scenario = slurm.pinned(scenario)
    nodes = _nodes(scenario, request)
    parsed(scenario)
    errors = Console(stderr=True)
    waiting = errors.status("resolving the cases") if errors.is_terminal else contextlib.nullcontext()
    with waiting:
        plan = plan_sweep(scenario, plugins=plugins, elsewhere=request.slurm)
    run = plan.scenario.run
    warning = too_short(
        [item.case for item in plan.cases if not item.unsupported],
        load_hardware(run.hardware),
        name=run.hardware,
        timeout_seconds=run.timeout_seconds,
    )
    warnings = [
        f"the exclude rule {rule.words} of scenario {base.name!r} matches none of its cases" for rule in idle
    ]
    for text in (*warnings, *([warning] if warning else [])):
        errors.print(Text(f"warning: {text}"), soft_wrap=not errors.is_terminal)
    return plan, nodes


def _with_flags(base: Scenario, request: SweepRequest) -> Scenario:
    raw = base.model_dump(exclude_none=True)
    raw["sweep"] |= request.axes
    raw["run"] |= request.run
    raw["stack"] |= request.stack
    check_options(request.options, raw["sweep"]["method"], request.plugins)
    for method, fields in request.options.items():
        raw["options"][method] = raw["options"].get(method, {}) | fields
    return build_scenario(raw)


def check_options(
    options: Mapping[str, Mapping[str, object]], methods: Sequence[str], plugins: Sequence[Path]
) -> None:
    """Refuse options of methods that do not exist, or that are not asked for.

    Raises:
        UsageError: saying which of both.
    """
    for method, fields in options.items():
        if method not in methods:
            registry.require(method, plugins)
            raise UsageError(
                f"--option {method}.{next(iter(fields))}: {method!r} is not among the methods asked for "
                f"({', '.join(methods)}); add --method {method}"
            )


def _nodes(scenario: Scenario, request: SweepRequest) -> Nodes:
    """This machine's place among those that run ranks; a sweep without ranks runs on one, whatever it stands for."""
    count, mode = scenario.run.nodes or 1, chosen_mode(scenario).mode
    if request.slurm:
        if request.node_rank or request.endpoint is not None:
            raise UsageError("--launcher slurm finds --node-rank and --rdzv-endpoint itself; leave them out")
        return Nodes(count=count)
    if mode != "measure":
        if request.node_rank:
            raise UsageError(
                f"--node-rank {request.node_rank}: only measured ranks are spread over machines, "
                f"and the mode is {mode}; leave it out and start the command on one machine"
            )
        return Nodes()
    if request.node_rank >= count:
        raise UsageError(f"--node-rank {request.node_rank} must be below --nodes {count}")
    if count > 1 and request.endpoint is None:
        raise UsageError(
            f"--nodes {count} needs --rdzv-endpoint HOST:PORT, an address of node 0 all nodes can reach"
        )
    if count > 1 and request.name is None:
        raise UsageError(f"--nodes {count} needs --name RUN, so that every node means the same run")
    return Nodes(count=count, rank=request.node_rank, endpoint=request.endpoint)
