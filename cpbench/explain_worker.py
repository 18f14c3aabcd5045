"""Estimates a case, takes its peak apart, and estimates variants of it, in a process of its own.

    python -m cpbench.explain_worker < request.json > answer.json

The request is `{"cases", "plugins"}`, the cases resolved; the answer a list: for the first case an `Anatomy`, for the
others `{"peak_bytes", "host_bytes"}`.  A case that cannot run gives `{"unsupported": reason}`; a variant whose estimate
fails gives that too, so that what is known of the case itself is not lost with it.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from cpbench import registry
from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.memory.anatomy import anatomy
from cpbench.memory.categories import analyse
from cpbench.memory.timeline import Timeline
from cpbench.world.estimate import STEP, ranks_to_run, traced_step
from cpbench.world.layers import host_peak_bytes


def explain(case: Case, plugins: list[Path], *, whole: bool) -> dict[str, Any]:
    """Return the answer for a case."""
    try:
        method = registry.load(case.method, case.options, plugins)
        method.check(case)
        # The first of the representative ranks needs most memory.
        events = traced_step(case, method, rank=ranks_to_run(case, method)[0]).trace.events
    except Unsupported as error:
        return {"unsupported": str(error)}
    host = host_peak_bytes(events)
    if whole:
        return anatomy(events, step=STEP, host_bytes=host).model_dump(mode="json")
    return {"peak_bytes": analyse(Timeline(events), step=STEP).peak_bytes, "host_bytes": host}


def _variant(case: Case, plugins: list[Path]) -> dict[str, Any]:
    try:
        return explain(case, plugins, whole=False)
    except Exception as error:
        traceback.print_exc()
        return {"unsupported": f"the estimate failed: {type(error).__name__}: {error}"}


if __name__ == "__main__":
    request = json.load(sys.stdin)
    first, *variants = (Case.model_validate(raw) for raw in request["cases"])
    files = [Path(plugin) for plugin in request["plugins"]]
    answers = [explain(first, files, whole=True), *(_variant(case, files) for case in variants)]
    json.dump(answers, sys.stdout)
