"""Resolves and estimates one case as asked for: what `cpbench plan` has done in processes of the estimate pool.

    python -m cpbench.plan_worker job.json

The job, the log and what a failure leaves are those of `cpbench.worker`; the report is a `CaseReport`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cpbench import registry
from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.rank_report import CaseReport
from cpbench.worker import leave, run_rank


def main(job_file: str) -> int:
    """Answer for the job's case; return the exit code."""
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    case, plugins = Case.model_validate(job["case"]), [Path(path) for path in job["plugins"]]
    return run_rank(Path(job["scratch"]), Path(job["log_dir"]), lambda: answer(case, plugins))


def answer(case: Case, plugins: list[Path]) -> CaseReport:
    """Return what comes of a case.

    Raises:
        CpbenchError: the method or an option does not exist or has a wrong value.
    """
    from cpbench.resolve import resolve  # torch is loaded here, so that its failure is reported too
    from cpbench.world.estimate import estimate_ranks

    try:
        case, unsupported = resolve(case, plugins)
        if unsupported is None:
            method = registry.load(case.method, case.options, plugins)
            return CaseReport(case=case, report=estimate_ranks(case, method))
    except Unsupported as error:
        unsupported = str(error)
    return CaseReport(case=case, unsupported=unsupported)


if __name__ == "__main__":
    leave(main(sys.argv[1]))
