"""How to run what a plan recommends: the sweep's command, the scenario where flags do not suffice, torchrun's line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cpbench.context_plan import Question, Recommendation
from cpbench.launch import WORKER
from cpbench.scenario import RunSettings
from cpbench.units import format_length


def sweep_command(
    question: Question,
    choice: Recommendation,
    *,
    model: str,
    host_ram: str | None = None,
    plugins: Sequence[Path] = (),
    scenario: Path | None = None,
) -> list[str]:
    """Return the `cpbench sweep` command that measures a recommendation; with another `--mode` it estimates it.

    Args:
        question: what was asked.
        choice: what is recommended.
        model: as the user named it.
        host_ram: as the user gave it; None if the profile's was taken.
        plugins: files of further methods.
        scenario: a file with all of it; None to say it by flags.
    """
    command = ["cpbench", "sweep", "--mode", "measure", "--device", "cuda"]
    if scenario is not None:
        command += ["--scenario", str(scenario)]
    else:
        c = choice.configuration
        command += ["--method", c.method, "--model", model, "--seqlen", format_length(choice.point.seq_len)]
        command += ["--world", str(choice.world_size)]
        for key, value in c.options.items():
            command += ["--option", f"{c.method}.{key}={_text(value)}"]
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
