"""Parity with ranks as threads: what `make gpu` checks on a GPU, here on the CPU, and planted faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpbench.case import Case
from cpbench.model_config import ModelConfig
from cpbench.parity import one_device
from cpbench.parity.one_device import block_checks, kernel_findings, main, method_findings
from cpbench.parity.thread_ranks import ThreadRanks, Threads
from cpbench.resolve import resolve

CPU = torch.device("cpu")
BROKEN = Path(__file__).parents[2] / "methods" / "broken"


def small_case(method: str, plugins: list[Path], **options: str) -> Case:
    model = ModelConfig(
        hidden_dim=48, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=16, ffn_dim=48, vocab_size=97
    )
    requested = Case(
        method=method,
        options=dict(options),
        model="small",
        architecture=model,
        seq_len=64,
        world_size=4,
        dtype="float32",
    )
    case, unsupported = resolve(requested, plugins)
    assert unsupported is None
    return case


@pytest.mark.parametrize("method", ["ring", "upipe"])
def test_threads_compute_what_ranks_compute(method: str) -> None:
    """Messages and all-to-alls between threads carry the right tensors: output and gradients agree."""
    found = block_checks(small_case(method, []), CPU)
    assert all(check.passed for check in found)
    assert {check.name for check in found} >= {"out", "dx", "dwq", "dwk", "dwv", "dwo", "out (checkpoint)"}


@pytest.mark.parametrize("name", ["broken-rotation", "broken-ring"])
def test_a_planted_fault_is_found(name: str) -> None:
    """A wrong rotation and a wrong ring do not pass."""
    plugins = [BROKEN / f"{name.replace('-', '_')}.py"]
    found = block_checks(small_case(name, plugins), CPU, plugins)
    assert not all(check.passed for check in found)


def test_the_first_failure_is_the_one_that_is_told() -> None:
    """One rank fails while the others wait for it: its error comes back, and soon."""

    def work(ranks: ThreadRanks) -> None:
        if ranks.rank == 1:
            raise ArithmeticError("planted")
        ranks.sum({"t": torch.ones(1)})

    with pytest.raises(ArithmeticError, match="planted"):
        Threads(3, CPU).run(work)


def test_a_kernel_that_is_wrong_or_refuses_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape of a sound kernel passes; a backend that cannot run is a finding, not an end."""
    assert all(finding.passed for finding in kernel_findings(CPU, "float32"))
    monkeypatch.setattr(one_device, "KERNELS", {"cpu": ("cuda-flash",)})
    refused = list(kernel_findings(CPU, "float32"))
    assert refused
    assert not any(finding.passed for finding in refused)
    monkeypatch.setattr(one_device, "KERNELS", {"cpu": ("cpu-flash",)})
    monkeypatch.setattr(one_device, "_KERNEL_LIMIT", {"float32": 1e-12})
    assert not any(finding.passed for finding in kernel_findings(CPU, "float32"))


def test_what_cannot_run_is_a_finding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that needs processes, and an option that a shape does not allow, are not run, with the reason."""
    monkeypatch.setattr(one_device, "_SHAPES", ((4, 4, 16, 32, 66),))
    found = list(method_findings(CPU, "float32", ["torch-ring", "ring"]))

    assert {finding.name for finding in found} == {"torch-ring", "ring"}
    assert {finding.passed for finding in found} == {None}
    assert any("device mesh" in finding.worst for finding in found)
    assert any("seq_len=66" in finding.worst for finding in found)


def test_the_command_says_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has every finding, and the exit code is theirs."""
    out = tmp_path / "parity.json"
    monkeypatch.setattr(one_device, "_KERNEL_SHAPES", one_device._KERNEL_SHAPES[:1])
    monkeypatch.setattr(one_device, "_SHAPES", ((4, 4, 16, 32, 64),))
    arguments = ["--device", "cpu", "--dtype", "float32", "--method", "single", "--out", str(out)]
    assert main(arguments) == 0
    assert '"name": "single"' in out.read_text(encoding="utf-8")
    monkeypatch.setattr(one_device, "_KERNEL_LIMIT", {"float32": 1e-12})
    assert main(arguments) == 1
