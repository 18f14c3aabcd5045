"""Stands in for `cpbench.worker`: no torch, and it fails in every way a worker can.

torchrun runs it as a script; a fork of an estimate server imports it and calls `main`.  What it does is the case's
option `act`; of several ranks it is the last one that fails.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
LAST = RANK == WORLD - 1


def report(losses: tuple[float, ...] = (7.0, 6.9)) -> dict[str, Any]:
    sample = {"step_seconds": 0.5, "forward_seconds": 0.2, "backward_seconds": 0.2, "optimizer_seconds": 0.1}
    ranks = [
        {
            "rank": rank,
            "memory": {
                "peak_allocated_bytes": 1000 + rank,
                "peak_by_category_bytes": {"parameters": 1000 + rank},
            },
            "samples": [sample, sample],
            "losses": losses,
            "grad_norms": losses,
            "collective_bytes": {"all_to_all": 64},
            "attention_backend": "cpu-flash",
        }
        for rank in range(WORLD)
    ]
    return {"ranks": ranks, "software": {"torch": "0.0-fake"}}


def fail(scratch: Path, status: str, reason: str) -> None:
    body = {"rank": RANK, "status": status, "reason": reason, "time": time.time()}
    (scratch / f"failure-rank{RANK}.json").write_text(json.dumps(body), encoding="utf-8")
    sys.exit(1)


def act(what: str, scratch: Path) -> None:
    if what == "fail" and LAST:
        fail(scratch, "error", "the flux capacitor is empty")
    if what == "oom" and LAST:
        fail(scratch, "oom_device", "3.0 GiB more were asked for")
    if what == "crash" and LAST:
        raise RuntimeError("nobody wrote a failure file")
    if what == "kill" and LAST:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "abort" and LAST:
        os.abort()
    if what in ("kill", "abort", "crash", "fail", "oom"):
        time.sleep(60)  # as a rank that waits for its dead peer
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # A grandchild in a session of its own whose parent is gone: no group kill reaches it.
        nap = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", nap], start_new_session=True)
    if what == "hang" and (scratch.parents[2] / "relaxed").exists():
        return
    if what in ("hang", "stubborn"):
        if RANK == 0:
            write(scratch / "progress.json", {"phase": "step", "done": 2, "total": 5})
        sys.stdout.write("stuck in a collective\n")
        sys.stdout.flush()
        (scratch / f"hanging-rank{RANK}").touch()
        time.sleep(600)


def write(path: Path, body: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(body), encoding="utf-8")
    temporary.replace(path)


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    scratch, logs = Path(job["scratch"]), Path(job["log_dir"])
    log = os.open(logs / f"rank{RANK}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    what = str(job["case"]["options"].get("act", "ok"))
    act(what, scratch)
    if RANK == 0 and what == "garbled":
        (scratch / "report.json").write_text('{"ranks": [', encoding="utf-8")
    elif RANK == 0 and what == "nan":
        body = report()
        body["ranks"][0]["losses"] = [7.0, None]
        write(scratch / "report.json", body)
    elif RANK == 0 and what != "silent":
        write(scratch / "report.json", report() | {"gpu": f"process {os.getpid()}"})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
