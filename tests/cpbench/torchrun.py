"""Runs a script as several ranks under torchrun, and leaves none of them behind, however it ends."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cpbench.launch import end_supervised


def run_ranks(
    script: Path, arguments: Sequence[str], *, ranks: int, environment: Mapping[str, str], timeout: float
) -> None:
    """Run a script as `ranks` processes and wait for it.

    Args:
        script: a Python file.
        arguments: of the script.
        ranks: how many.
        environment: of the processes.
        timeout: seconds; then all are ended, and the test fails.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    command += [f"--nproc-per-node={ranks}", str(script), *arguments]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "cpbench.supervise", *command],
            env=dict(environment),
            stdin=subprocess.PIPE,  # the supervisor's lifeline; closing it ends every rank
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=timeout)
        finally:
            end_supervised(process)
            said.seek(0)
            words = said.read().decode(errors="replace")[-6000:]
    assert process.returncode == 0, words
