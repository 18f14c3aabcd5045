"""One rank of `cpbench verify`: started by torchrun, checks every method of the job, rank 0 writes the report.

    torchrun ... -m cpbench.verify_worker job.json

The job is a `VerifyJob`; the answer is `<scratch>/report.json`, a `VerifyReport`.
"""

from __future__ import annotations

import sys
import traceback
from datetime import timedelta
from pathlib import Path

from cpbench.verification import Verification, VerifyJob, VerifyReport
from cpbench.worker import run_rank


def verify(job: VerifyJob) -> VerifyReport:
    """Verify every case of the job on this rank; all cases have the same shape."""
    import os

    import torch
    import torch.distributed as dist

    from cpbench import registry
    from cpbench.errors import CpbenchError
    from cpbench.parity import ParityRank

    first = job.cases[0]
    if first.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    # A method that hangs is ended by this limit and named by the rank that waits.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    plugins = [Path(plugin) for plugin in job.plugins]
    rank = ParityRank(first, plugins, device)
    baseline = None
    if first.dtype != "float32":
        ulysses = registry.resolved_options(registry.load("ulysses", {}))
        baseline = rank.errors(first.model_copy(update={"method": "ulysses", "options": ulysses}))
    results = []
    for case in job.cases:
        try:
            results.append(rank.verify(case, baseline))
        except CpbenchError:
            raise
        except Exception as error:
            # A deterministic fault (a wrong shape, say) hits every rank alike, so all go on to the next method.
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            results.append(
                Verification(method=case.method, options=case.options, verdict="error", reason=reason)
            )
    dist.destroy_process_group()
    a = first.architecture
    shape: dict[str, int | str] = {
        "world_size": first.world_size,
        "seq_len": first.seq_len,
        "batch_size": first.batch_size,
        "num_heads": a.num_heads,
        "num_kv_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "hidden_dim": a.hidden_dim,
        "num_layers": a.num_layers,
        "dtype": first.dtype,
        "device": first.device,
    }
    return VerifyReport(shape=shape, results=tuple(results))


def main(job_file: str) -> int:
    """Run the job of this rank; return the exit code."""
    job = VerifyJob.model_validate_json(Path(job_file).read_text(encoding="utf-8"))
    return run_rank(Path(job.scratch), Path(job.log_dir), lambda: verify(job))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
