"""How to run what a plan recommends: the sweep's command, the same as a scenario, torchrun's line, the time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cpbench.case import TRACED_STEPS
from cpbench.context_plan import Question, Recommendation
from cpbench.durations import SAFETY, START_SECONDS, StepBudget, step_budget
from cpbench.launch import WORKER
from cpbench.scenario import RunSettings
from cpbench.units import format_length, format_seconds


def sweep_command(
    question: Question,
    choice: Recommendation,
    *,
    model: str,
    host_ram: str | None = None,
    plugins: Sequence[Path] = (),
) -> list[str]:
    """Return the `cpbench sweep` command that measures a recommendation; with another `--mode` it estimates it.

    Args:
        question: what was asked.
        choice: what is recommended.
        model: as the user named it.
        host_ram: as the user gave it; None if the profile's was taken.
        plugins: files of further methods.
    """
    c = choice.configuration
    command = ["cpbench", "sweep", "--mode", "measure", "--device", "cuda"]
    command += ["--method", c.method, "--model", model, "--seqlen", format_length(choice.point.seq_len)]
    command += ["--world", str(choice.world_size)]
    for key, value in c.options.items():
        command += ["--option", f"{c.method}.{key}={_text(value)}"]
    for key, change in c.stack.items():
        command += ["--stack-option", f"{key}={_text(change)}"]
    if question.batch_size != 1:
        command += ["--batch", str(question.batch_size)]
    if question.dtype != "bfloat16":
        command += ["--dtype", question.dtype]
    if question.hardware != RunSettings().hardware:
        command += ["--hardware", question.hardware]
    if host_ram is not None:
        command += ["--host-ram", host_ram]
    if choice.nodes > 1:
        command += [
            "--nodes",
            str(choice.nodes),
            "--node-rank",
            "K",
            "--rdzv-endpoint",
            "HOST:29500",
            "--name",
            "RUN",
        ]
    budget = _budget(choice)
    if budget is not None:
        command += ["--steps", str(budget.steps), "--timeout", str(budget.timeout_seconds)]
    for plugin in plugins:
        command += ["--plugin", str(plugin)]
    return command


def scenario_text(
    question: Question, choice: Recommendation, *, model: str, host_ram: str | None = None
) -> str:
    """Return the TOML of a scenario with the one recommended case; arguments as in `sweep_command`."""
    c = choice.configuration
    lines = [
        f"# Does {format_length(choice.point.seq_len)} train on {choice.world_size} ranks as `cpbench plan` says?",
        "",
        f"description = {json.dumps(f'Recommended by cpbench plan for {question.hardware}.')}",
        "",
        "[run]",
        f"hardware = {json.dumps(question.hardware)}",
        f"nodes = {choice.nodes}",
        *([] if host_ram is None else [f"host_memory_bytes = {json.dumps(host_ram)}"]),
        *_limits(choice),
        "",
        "[sweep]",
        f"method = {json.dumps(c.method)}",
        f"model = {json.dumps(model)}",
        f"seq_len = {json.dumps(format_length(choice.point.seq_len))}",
        f"world_size = {choice.world_size}",
        f"batch_size = {question.batch_size}",
        f"dtype = {json.dumps(question.dtype)}",
        'stack = "long"',
        "",
    ]
    if c.stack:
        lines += ["[stack]", *(f"{key} = {json.dumps(value)}" for key, value in c.stack.items()), ""]
    if c.options:
        lines += [f"[options.{json.dumps(c.method)}]"]
        lines += [*(f"{key} = {json.dumps(value)}" for key, value in c.options.items()), ""]
    return "\n".join(lines)


def duration_words(choice: Recommendation) -> str:
    """Return how long the command takes by the time model, and where its limits come from."""
    budget = _budget(choice)
    if budget is None:
        return "the profile has no rates, so no time is modelled: choose --timeout yourself (default: 1800 seconds)"
    timed = f"{budget.steps} timed step" + "s" * (budget.steps > 1)
    return (
        f"it takes about {format_seconds(budget.seconds)}: {TRACED_STEPS} traced and {timed} of "
        f"{format_seconds(choice.point.step_seconds)}; --timeout is {SAFETY} times that and "
        f"{format_seconds(START_SECONDS)}"
    )


def _budget(choice: Recommendation) -> StepBudget | None:
    return None if choice.point.step_seconds is None else step_budget(choice.point.step_seconds)


def _limits(choice: Recommendation) -> list[str]:
    budget = _budget(choice)
    return [f"steps = {budget.steps}", f"timeout_seconds = {budget.timeout_seconds}.0"] if budget else []


def torchrun_line(choice: Recommendation) -> str:
    """Return torchrun's command line on a node; the sweep writes the job's file."""
    local = choice.world_size // choice.nodes
    words = ["torchrun", "--nproc-per-node", str(local)]
    if choice.nodes > 1:
        words += ["--nnodes", str(choice.nodes), "--node-rank", "K", "--rdzv-backend", "static"]
        words += ["--rdzv-endpoint", "HOST:29500"]
    else:
        words += ["--standalone"]
    return " ".join([*words, *WORKER, "JOB.json"])


def _text(value: bool | float | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
