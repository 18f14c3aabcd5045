"""Estimates one case and takes its peak apart, in a process of its own.

    python -m cpbench.explain_worker < request.json > answer.json

The request is `{"case", "plugins", "whole"}`, the case resolved; the answer an `Anatomy` if `whole`, else
`{"peak_bytes", "host_bytes"}`, or `{"unsupported": reason}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cpbench import registry
from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.memory.anatomy import anatomy
from cpbench.memory.categories import analyse
from cpbench.memory.timeline import Timeline
from cpbench.world.estimate import STEP, traced_step
from cpbench.world.layers import host_peak_bytes


def explain(case: Case, plugins: list[Path], *, whole: bool) -> dict[str, Any]:
    """Return the answer for a case."""
    try:
        method = registry.load(case.method, case.options, plugins)
        method.check(case)
        events = traced_step(case, method, rank=case.rank or 0).trace.events
    except Unsupported as error:
        return {"unsupported": str(error)}
    host = host_peak_bytes(events)
    if whole:
        return anatomy(events, step=STEP, host_bytes=host).model_dump(mode="json")
    return {"peak_bytes": analyse(Timeline(events), step=STEP).peak_bytes, "host_bytes": host}


if __name__ == "__main__":
    request = json.load(sys.stdin)
    answer = explain(
        Case.model_validate(request["case"]),
        [Path(plugin) for plugin in request["plugins"]],
        whole=request["whole"],
    )
    json.dump(answer, sys.stdout)
