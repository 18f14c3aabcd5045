"""One rank of a measured case: started by torchrun, runs the steps, hands back a report.

    torchrun ... -m cpbench.worker job.json

The job is `{"case", "plugins", "scratch", "log_dir"}`.  Output goes to `<log_dir>/rank<k>.log`.  Rank 0 writes
`<scratch>/report.json` (a `WorkerReport`) and now and then `<scratch>/progress.json`; a rank that fails writes
`<scratch>/failure-rank<k>.json` (a `RankFailure`) before it exits.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel

from cpbench.case import Case
from cpbench.errors import CpbenchError, Uncountable, Unsupported
from cpbench.record import RankFailure, Status, write_text_atomically


def main(job_file: str) -> int:
    """Run the job of this rank; return the exit code."""
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))

    def run() -> BaseModel:
        from cpbench.world.run import run_case  # torch is imported here, so that its failure is reported too

        return run_case(
            Case.model_validate(job["case"]), [Path(p) for p in job["plugins"]], Path(job["scratch"])
        )

    return run_rank(Path(job["scratch"]), Path(job["log_dir"]), run)


def run_rank(scratch: Path, log_dir: Path, run: Callable[[], BaseModel]) -> int:
    """Run something on this rank: output to its log, rank 0's report to a file, a failure to another.

    Args:
        scratch: folder of `report.json` and `failure-rank<k>.json`.
        log_dir: folder of `rank<k>.log`.
        run: gives the report; its result counts on rank 0 only.

    Returns:
        The exit code 0; a failure ends the process.
    """
    rank = int(os.environ.get("RANK", "0"))
    _redirect_output(log_dir / f"rank{rank}.log")
    faulthandler.enable()  # a crash in native code leaves the lines that led to it in the log
    # So does a rank that is ended because it took too long.
    faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)
    try:
        report = run()
        if rank == 0:
            write_text_atomically(scratch / "report.json", report.model_dump_json())
    except BaseException as error:
        _report_failure(scratch, rank, error)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        # Leave without waiting for the other ranks: they may be stuck in a collective that will not come.
        sys.stderr.flush()
        os._exit(1)
    return 0


def leave(code: int) -> NoReturn:
    """End this process now, with its results written and its process groups left.

    Without the interpreter's finalisation: gloo and the profiler have threads of their own, and one that asks for the
    interpreter's lock meanwhile is ended in the middle of C++ code, which aborts the process ("terminate called
    without an active exception") and would turn a finished case into a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def classify(error: BaseException) -> tuple[Status, str]:
    """Return the status and the reason in words of what a rank could not survive."""
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    name = type(error).__name__
    if isinstance(error, Unsupported):
        return "unsupported", str(error)
    if isinstance(error, Uncountable):
        return "invalid", str(error)
    if isinstance(error, CpbenchError):
        return "error", str(error)
    if name == "OutOfMemoryError":  # torch.OutOfMemoryError, without importing torch for it
        return "oom_device", f"device memory ran out: {first_line}"
    if (
        isinstance(error, MemoryError)
        or "can't allocate memory" in str(error)
        or "pin memory" in str(error).lower()
    ):
        return "oom_host", f"host memory ran out: {first_line or name}"
    return "error", f"{name}: {first_line}" if first_line else name


def _report_failure(scratch: Path, rank: int, error: BaseException) -> None:
    text = traceback.format_exc()
    sys.stderr.write(text)
    status, reason = classify(error)
    failure = RankFailure(rank=rank, status=status, reason=reason, traceback=text[-20_000:], time=time.time())
    try:
        write_text_atomically(scratch / f"failure-rank{rank}.json", failure.model_dump_json())
    except OSError as problem:  # a full disk must not hide the cause, which is in the log
        sys.stderr.write(f"the failure could not be written: {problem}\n")


def _redirect_output(path: Path) -> None:
    """Send this process's output, and that of the libraries in it, to its own log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    leave(main(sys.argv[1]))
