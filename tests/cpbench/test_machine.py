"""Machine facts: GPUs through NVML, the visible ones only, peaks of known accelerators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from cpbench import machine
from cpbench.machine import Machine, peak_flops, this_machine, visible_gpus


def fake_nvml(count: int) -> SimpleNamespace:
    return SimpleNamespace(
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: f"NVIDIA H100 80GB HBM3 #{handle}".encode(),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 * 2**30),
        nvmlSystemGetDriverVersion=lambda: "570.1",
    )


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nvml() -> Iterator[SimpleNamespace]:
        yield fake_nvml(4)

    monkeypatch.setattr(machine, "nvml", nvml)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2,0", [2, 0]),
        ("1,-1,2", [1]),
        ("0,9,1", [0]),
        ("GPU-abc,GPU-def", [0, 1]),
    ],
)
def test_visible_devices_are_honoured(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, chosen: list[int]
) -> None:
    """CUDA_VISIBLE_DEVICES selects, orders, and ends the list at the first invalid index, as CUDA does."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus, driver = visible_gpus()
    assert [gpu.name for gpu in gpus] == [f"NVIDIA H100 80GB HBM3 #{index}" for index in chosen]
    assert driver == "570.1"


def test_no_driver_is_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without an NVIDIA driver has no GPUs, and asking is no error."""

    @contextmanager
    def nvml() -> Iterator[None]:
        yield None

    monkeypatch.setattr(machine, "nvml", nvml)
    assert visible_gpus() == ((), None)
    assert this_machine().name.startswith("cpu-")


@pytest.mark.usefixtures("four_gpus")
def test_the_label_names_the_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short label is made of count and model and can be a folder's name."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_machine().name == "4x-h100-80gb-hbm3-0"


def test_facts_survive_json() -> None:
    """The machine in a record reads back equal."""
    facts = this_machine()
    assert facts.cpu_count >= 1
    assert facts.host_memory_bytes > 2**20
    assert Machine.model_validate_json(facts.model_dump_json()) == facts


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H200", 989.4e12),
        ("Something Else", None),
        (None, None),
    ],
)
def test_peaks_of_known_accelerators(gpu: str | None, peak: float | None) -> None:
    """The bf16 peak by the name the driver gives; an unknown device has none, so there is no MFU."""
    assert peak_flops(gpu, "bfloat16") == peak


def test_float32_peak_is_lower() -> None:
    """float32 without TF32 has its own, much lower peak."""
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") == 66.9e12
