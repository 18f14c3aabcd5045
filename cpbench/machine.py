"""Facts of the machine a record was made on, gathered without torch, and the peaks of known accelerators."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict

from cpbench.case import Dtype

# Dense peak rates in FLOP/s from the vendors' data sheets: (bfloat16 tensor cores, float32 without TF32).
_PEAK_FLOPS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250e12, 75e12),  # NVIDIA DGX B200 data sheet, per GPU
    ("H200", 989.4e12, 66.9e12),  # NVIDIA H200 data sheet, SXM
    ("H100 PCIe", 756e12, 51e12),  # NVIDIA H100 data sheet, PCIe
    ("H100", 989.4e12, 66.9e12),  # NVIDIA H100 data sheet, SXM
    ("A100", 312e12, 19.5e12),  # NVIDIA A100 data sheet
    ("MI300X", 1307.4e12, 163.4e12),  # AMD MI300X data sheet
    ("RTX 4090", 165.2e12, 82.6e12),  # NVIDIA Ada whitepaper, fp32 accumulation
)


class Gpu(BaseModel):
    """One visible GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory_bytes: int


class Machine(BaseModel):
    """What a reader must know of a machine to judge a number; no host name and no path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Short label: accelerators if there are any, else processor and cores, for example `2x-h100-80gb`."""
    os: str
    python: str
    cpu: str
    cpu_count: int
    """Logical processors this process may use."""
    host_memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    """Version of the GPU driver."""


def peak_flops(gpu: str | None, dtype: Dtype) -> float | None:
    """Return the dense peak of a GPU in FLOP/s, or None for an unknown one (then there is no MFU)."""
    for name, bfloat16, float32 in _PEAK_FLOPS:
        if gpu is not None and all(word in gpu for word in name.split()):
            return bfloat16 if dtype == "bfloat16" else float32
    return None


def usable_cpus() -> int:
    """Return how many logical processors this process may run on."""
    return len(os.sched_getaffinity(0))


def threads_of_rank(ranks: int) -> int:
    """Return the threads of each of `ranks` CPU processes: the user's OMP_NUM_THREADS, or a share of the cores."""
    chosen = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(chosen) if chosen.isdecimal() and int(chosen) else max(1, usable_cpus() // ranks)


def visible_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """Return the GPUs this process may use and the driver version, by NVML, without starting CUDA.

    `CUDA_VISIBLE_DEVICES` is honoured.  Without a driver the answer is no GPUs.
    """
    with nvml() as library:
        if library is None:
            return (), None
        handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
        chosen = [handles[i] for i in _visible_indices(len(handles))]
        gpus = tuple(
            Gpu(
                name=_text(library.nvmlDeviceGetName(handle)),
                memory_bytes=int(library.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in chosen
        )
        return gpus, _text(library.nvmlSystemGetDriverVersion())


@contextmanager
def nvml() -> Iterator[Any]:
    """Give the initialised NVML module, or None where there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def this_machine() -> Machine:
    """Gather the facts of the machine this process runs on."""
    gpus, driver = visible_gpus()
    cpu, count = _cpu_name(), usable_cpus()
    label = f"{len(gpus)}x-{gpus[0].name.removeprefix('NVIDIA ')}" if gpus else f"cpu-{count}x-{cpu}"
    return Machine(
        name=re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:48].strip("-"),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        cpu=cpu,
        cpu_count=count,
        host_memory_bytes=psutil.virtual_memory().total,
        gpus=gpus,
        driver=driver,
    )


def _visible_indices(count: int) -> list[int]:
    """Indices named by CUDA_VISIBLE_DEVICES; UUIDs count as "some device", by order."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return list(range(count))
    chosen: list[int] = []
    for position, entry in enumerate(part.strip() for part in value.split(",") if part.strip()):
        if entry.lstrip("-").isdigit():
            if not 0 <= int(entry) < count:
                break  # CUDA stops at the first invalid index
            chosen.append(int(entry))
        elif position < count:
            chosen.append(position)
    return chosen


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
