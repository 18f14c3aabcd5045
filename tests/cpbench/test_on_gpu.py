"""The checks of `make gpu` as tests; they need a CUDA device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpbench import registry
from cpbench.case import Case
from cpbench.launch import child_environment
from cpbench.model_config import PRESETS
from cpbench.parity.kernel_checks import kernel_findings
from cpbench.resolve import resolve
from cpbench.world.run import run_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = [name for name in registry.method_files() if name != "single"]


def test_every_kernel_equals_textbook_attention() -> None:
    """Output, log-sum-exp and gradients of every backend in bfloat16."""
    findings = list(kernel_findings(torch.device("cuda"), "bfloat16"))
    assert findings
    assert [finding for finding in findings if not finding.passed] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_method_equals_the_textbook_block() -> None:
    """Four ranks as processes, on one GPU where there are fewer; errors stay within 1.5 times those of the baseline."""
    command = [sys.executable, "-m", "cpbench", "verify", "--device", "cuda", "--quick", "--block-only"]
    command += ["--dtype", "bfloat16", "--json", "--timeout", "500"]
    environment = child_environment(1, single_node=True)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)

    assert ended.returncode == 0, ended.stderr[-6000:]
    report = json.loads(ended.stdout)
    assert report["shared_gpu"] == (torch.cuda.device_count() < 4)
    found = {
        findings["method"]: findings["verdict"] for findings in report["methods"] if not findings["given"]
    }
    assert found == dict.fromkeys(registry.method_files(), "pass")


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_of_an_emulated_rank(method: str, tmp_path: Path) -> None:
    """One layer of llama3-8b at 64K tokens, rank 3 of 8: finite; the estimate of the peak is within -0.1 and +0.1 %."""
    model = PRESETS["llama3-8b"].model_copy(update={"num_layers": 1})
    requested = Case(
        method=method,
        model="llama3-8b",
        architecture=model,
        model_layers=32,
        seq_len=65536,
        world_size=8,
        mode="emulate",
        device="cuda",
        hardware="h100-80g",
        rank=3,
        steps=1,
        warmup=0,
    )
    case, unsupported = resolve(requested, [])
    if unsupported:
        pytest.skip(unsupported)
    report = run_case(case, [], tmp_path)
    (rank,) = report.ranks
    peak = rank.memory.peak_allocated_bytes
    assert None not in rank.losses + rank.grad_norms
    assert peak
    assert report.estimated_peak_bytes is not None
    assert abs(report.estimated_peak_bytes - peak) / peak <= 0.001
