"""Estimates one case after another in a process that keeps torch loaded.

    python -m cpbench.estimate_worker

Every line on standard input is a request, `{"case", "plugins"}`; every line on standard output its answer: `{"case",
"report"}` with the resolved case and a `WorkerReport`, `{"case", "unsupported"}` with the reason, or `{"error"}` when
the estimate itself fails.  The end of standard input ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from cpbench import registry
from cpbench.case import Case
from cpbench.errors import CpbenchError, Unsupported
from cpbench.resolve import resolve
from cpbench.worker import leave
from cpbench.world.estimate import estimate_ranks


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to one request."""
    plugins = [Path(plugin) for plugin in request["plugins"]]
    case = Case.model_validate(request["case"])
    try:
        case, unsupported = resolve(case, plugins)
        if unsupported is None:
            method = registry.load(case.method, case.options, plugins)
            report = estimate_ranks(case, method)
            return {"case": case.model_dump(mode="json"), "report": report.model_dump(mode="json")}
    except Unsupported as error:
        unsupported = str(error)
    except CpbenchError as error:
        return {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"the estimate failed: {type(error).__name__}: {error}"}
    return {"case": case.model_dump(mode="json"), "unsupported": unsupported}


def main() -> int:
    """Answer until there are no more requests; what methods print goes to standard error."""
    torch.set_num_threads(1)  # several of these share the cores, and their tensors are fake
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    leave(main())
