"""The kernels of the CPU, as `make gpu` checks those of a GPU, and faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpbench.kernel_finding import KernelFindings
from cpbench.parity import kernel_checks
from cpbench.parity.kernel_checks import kernel_findings, main

CPU = torch.device("cpu")


def test_a_kernel_that_is_wrong_or_refuses_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape of a sound kernel passes; a backend that cannot run is a finding, not an end."""
    assert all(finding.passed for finding in kernel_findings(CPU, "float32"))
    monkeypatch.setattr(kernel_checks, "KERNELS", {"cpu": ("cuda-flash",)})
    refused = list(kernel_findings(CPU, "float32"))
    assert refused
    assert not any(finding.passed for finding in refused)
    monkeypatch.setattr(kernel_checks, "KERNELS", {"cpu": ("cpu-flash",)})
    monkeypatch.setattr(kernel_checks, "_LIMIT", {"float32": 1e-12})
    assert not any(finding.passed for finding in kernel_findings(CPU, "float32"))


def test_the_command_says_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has every finding, and the exit code is theirs."""
    out = tmp_path / "kernels.json"
    monkeypatch.setattr(kernel_checks, "_SHAPES", kernel_checks._SHAPES[:1])
    arguments = ["--device", "cpu", "--dtype", "float32", "--out", str(out)]
    assert main(arguments) == 0
    assert [finding.kernel for finding in KernelFindings.validate_json(out.read_bytes())] == ["cpu-flash"]
    monkeypatch.setattr(kernel_checks, "_LIMIT", {"float32": 1e-12})
    assert main(arguments) == 1
