"""The doctor: what can run here, and a reason for everything that cannot."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cpbench import doctor
from cpbench.cli import app
from cpbench.doctor import Diagnosis, Finding, examine
from cpbench.machine import Gpu, Machine, this_machine

GOOD = {"torch": "2.13.0+cu130", "cuda_built": "13.0", "cuda_devices": 2, "gloo": None, "nccl": None}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = this_machine()

    def machine() -> Machine:
        return plain.model_copy(
            update={"gpus": (Gpu(name="NVIDIA H100", memory_bytes=2**36),) * 2, "driver": "570"}
        )

    monkeypatch.setattr(doctor, "this_machine", machine)


def probe_says(monkeypatch: pytest.MonkeyPatch, findings: object, *, stderr: str = "", code: int = 0) -> None:
    done = SimpleNamespace(stdout=json.dumps(findings) if findings else "", stderr=stderr, returncode=code)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)


def by_name(diagnosis: Diagnosis) -> dict[str, Finding]:
    return {finding.name: finding for finding in (*diagnosis.can_run, *diagnosis.parts)}


def test_a_real_examination(tmp_path: Path) -> None:
    """On any machine that runs these tests, CPU processes can be measured and gloo works."""
    found = by_name(examine(tmp_path / "runs"))
    assert found["measure on CPU processes"].state == "yes"
    assert found["gloo"].value.startswith("works")
    assert "torch" in found
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("version", ["2.8.3", None])
def test_flash_attn_is_said_to_be_unused(
    version: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever has the package learns that it does not run; nobody is told to install it."""
    probe_says(monkeypatch, GOOD)
    monkeypatch.setattr(doctor, "package_version", lambda name: version)
    found = by_name(examine(tmp_path))

    assert ("flash-attn" in found) == (version is not None)
    assert version is None or "not used" in found["flash-attn"].value


@pytest.mark.usefixtures("gpus")
def test_gpus_that_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With GPUs, a CUDA build and NCCL, measuring on GPUs is possible up to their number."""
    probe_says(monkeypatch, GOOD)
    finding = by_name(examine(tmp_path))["measure on GPUs"]
    assert (finding.state, finding.value) == ("yes", "up to 2 ranks")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"cuda_built": None, "cuda_devices": 0}, "built without CUDA"),
        ({"cuda_devices": 0}, "newer than the driver"),
        ({"nccl": "RuntimeError: no socket"}, "NCCL: RuntimeError: no socket"),
    ],
)
def test_gpus_that_do_not_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, object], phrase: str
) -> None:
    """The first broken link between GPU and rank is the reason."""
    probe_says(monkeypatch, GOOD | change)
    finding = by_name(examine(tmp_path))["measure on GPUs"]
    assert finding.state == "no"
    assert phrase in finding.value


def test_a_torch_that_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A torch that cannot be started does not take the doctor with it."""
    probe_says(monkeypatch, None, stderr="x\nImportError: libcudart.so.13", code=1)
    found = by_name(examine(tmp_path))
    assert found["measure on CPU processes"].state == "no"
    assert "libcudart.so.13" in found["measure on CPU processes"].value
    assert found["nccl"].value == "not tried"


def test_the_command_prints_text_or_pure_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """`doctor --json` is JSON and nothing else; without it every `no` comes with words."""
    probe_says(monkeypatch, GOOD | {"cuda_devices": 0})
    body = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert set(body) == {"machine", "can_run", "parts"}
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "can run" in result.stdout
