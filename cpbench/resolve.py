"""Resolve requested cases: method options, degrees, and whether the method can run them.

    python -m cpbench.resolve < request.json > answer.json

The request is `{"cases": [Case...], "plugins": [path...]}`; the answer `{"cases": [{"case", "unsupported",
"method_source_hash"}...]}` in the same order, or `{"error": message}` when the user can mend it.  It runs in a process
of its own, because methods import torch and plug-ins are foreign code; neither belongs in the orchestrator.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cpbench import registry
from cpbench.case import Case
from cpbench.errors import CpbenchError, Unsupported
from cpbench.host_budget import with_saved_attention
from cpbench.runtime.kernels import select_kernels


def resolve(case: Case, plugins: list[Path]) -> tuple[Case, str | None]:
    """Return the case with every option and both degrees, and why it cannot run (None if it can).

    Raises:
        CpbenchError: the method or an option does not exist or has a wrong value.
    """
    method = registry.load(case.method, case.options, plugins)
    resolved = case.model_copy(update={"options": registry.resolved_options(method)})
    try:
        if case.world_size % case.nodes:
            raise Unsupported(
                f"world_size={case.world_size} is not a multiple of nodes={case.nodes}; choose one that is"
            )
        resolved = _with_rank(resolved)
        _within_window(resolved)
        method.check(resolved)
        select_kernels(resolved)
        resolved = resolved.model_copy(update={"stack": with_saved_attention(resolved)})
    except Unsupported as error:
        return resolved, str(error)
    layout = method.layout(resolved, 0)
    degrees = {"ulysses_degree": layout.ulysses_degree, "ring_degree": layout.ring_degree}
    return resolved.model_copy(update=degrees), None


def _with_rank(case: Case) -> Case:
    """The case with the rank that is emulated."""
    if case.mode == "measure":
        if case.rank is not None:
            raise Unsupported(
                f"rank={case.rank}: all ranks are measured; leave it out, or use --mode emulate"
            )
        return case
    if case.rank is not None and case.rank >= case.world_size:
        raise Unsupported(f"rank={case.rank} must be below world_size={case.world_size}")
    return case.model_copy(update={"rank": 0}) if case.mode == "emulate" and case.rank is None else case


def _within_window(case: Case) -> None:
    """Refuse sequences that are longer than a sliding window: the kernels here see every earlier key."""
    window = case.architecture.sliding_window
    if window is not None and case.seq_len > window:
        raise Unsupported(
            f"seq_len={case.seq_len} is longer than the model's sliding_window={window}, which the attention here does "
            f"not have; use at most {window}, or a config.json without a window"
        )


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    plugins = [Path(plugin) for plugin in request["plugins"]]
    answers = []
    try:
        for raw in request["cases"]:
            case, unsupported = resolve(Case.model_validate(raw), plugins)
            answers.append(
                {
                    "case": case.model_dump(mode="json"),
                    "unsupported": unsupported,
                    "method_source_hash": registry.source_hash(registry.require(case.method, plugins)),
                }
            )
    except CpbenchError as error:
        return {"error": str(error)}
    return {"cases": answers}


if __name__ == "__main__":
    answer = _answer(json.load(sys.stdin))
    json.dump(answer, sys.stdout)
