"""What this machine can run, and why not the rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cpbench
from cpbench.expand import cpu_process_limit
from cpbench.launch import child_environment
from cpbench.machine import Machine, this_machine
from cpbench.provenance import package_version
from cpbench.units import GIB, format_bytes

State = Literal["yes", "no", "warn"]
_PROBE_SECONDS = 120.0
_SMALL_SHM_BYTES = GIB  # gloo and NCCL move data between ranks through /dev/shm
_SMALL_DISK_BYTES = 2 * GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the doctor."""

    name: str
    state: State
    value: str
    advice: str = ""
    """What to do, where the state is not yes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Everything the doctor found."""

    machine: Machine
    can_run: tuple[Finding, ...]
    """One entry a way of running."""
    parts: tuple[Finding, ...]
    """The hardware and software below them."""


def examine(runs: Path) -> Diagnosis:
    """Look at this machine; takes a few seconds, because torch is started once.

    Args:
        runs: folder that will hold runs, for the free space of its disk.
    """
    machine = this_machine()
    probe = _probe()
    parts = (
        _python(),
        *_hardware(machine),
        _memory_folder(),
        _disk(runs),
        *_software(probe),
    )
    return Diagnosis(machine=machine, can_run=_abilities(machine, probe), parts=parts)


def _abilities(machine: Machine, probe: dict[str, Any]) -> tuple[Finding, ...]:
    gpus = len(machine.gpus)
    broken = probe.get("problem") or ("" if probe.get("gloo") is None else f"gloo: {probe['gloo']}")
    cpu = Finding(
        name="measure on CPU processes",
        state="no" if broken else "yes",
        value=broken or f"up to {cpu_process_limit()} ranks",
        advice="reinstall torch" if broken else "",
    )
    usable = min(gpus, int(probe.get("cuda_devices") or 0))
    why = probe.get("problem") or _gpu_problem(gpus, probe)
    cuda = Finding(
        name="measure on GPUs",
        state="no" if why else "yes",
        value=why or f"up to {usable} ranks",
        advice="use --mode estimate, or --device cpu" if why else "",
    )
    emulate = Finding(
        name="emulate one rank",
        state="no" if probe.get("problem") else "yes",
        value=probe.get("problem") or f"of any number of ranks, on {'a GPU' if usable else 'the CPU'}",
        advice="reinstall torch" if probe.get("problem") else "",
    )
    estimate = Finding(
        name="estimate memory",
        state="no" if probe.get("problem") else "yes",
        value=probe.get("problem") or "any number of ranks of any profile in `cpbench list hardware`",
        advice="reinstall torch" if probe.get("problem") else "",
    )
    return cpu, cuda, emulate, estimate


def _gpu_problem(gpus: int, probe: dict[str, Any]) -> str:
    if not gpus:
        return "no NVIDIA GPU is visible"
    if probe.get("cuda_built") is None:
        return f"torch {probe.get('torch')} is built without CUDA"
    if not probe.get("cuda_devices"):
        return "torch cannot use the GPUs; its CUDA may be newer than the driver"
    return f"NCCL: {probe['nccl']}" if probe.get("nccl") else ""


def _probe() -> dict[str, Any]:
    """The findings of `cpbench.probe`, or `{"problem": ...}`."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cpbench.probe"],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
            env=child_environment(None, single_node=True),
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"torch did not answer within {_PROBE_SECONDS:.0f} s"}
    try:
        findings = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"problem": f"torch cannot be started (code {done.returncode}): {last}"}
    return findings if isinstance(findings, dict) else {"problem": "torch gave no answer"}


def _python() -> Finding:
    return Finding(
        name="python", state="yes", value=f"{sys.version.split()[0]}, cpbench {cpbench.__version__}"
    )


def _hardware(machine: Machine) -> tuple[Finding, ...]:
    cores = Finding(name="cores", state="yes", value=f"{machine.cpu_count} ({machine.cpu})")
    limit = _memory_limit()
    total = format_bytes(machine.host_memory_bytes)
    limited = limit is not None and limit < machine.host_memory_bytes
    memory = Finding(
        name="host memory",
        state="yes",
        value=f"{format_bytes(limit)} allowed of {total}" if limited else total,
    )
    if machine.gpus:
        names = ", ".join(f"{gpu.name} ({format_bytes(gpu.memory_bytes)})" for gpu in machine.gpus)
        gpus = Finding(
            name="GPUs", state="yes", value=f"{len(machine.gpus)}: {names}; driver {machine.driver}"
        )
    else:
        reason = (
            "driver without visible GPU; look at CUDA_VISIBLE_DEVICES"
            if machine.driver
            else "no NVIDIA driver"
        )
        gpus = Finding(name="GPUs", state="no", value="none", advice=reason)
    return cores, memory, gpus


def _memory_limit() -> int | None:
    """The memory limit of this container's cgroup in bytes, version 2 or 1, or None."""
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _memory_folder() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Finding(
            name="/dev/shm", state="warn", value="missing", advice="NCCL needs it; mount a tmpfs there"
        )
    small = size < _SMALL_SHM_BYTES
    advice = "many ranks may die by SIGBUS; in docker add --shm-size=8g or --ipc=host" if small else ""
    return Finding(name="/dev/shm", state="warn" if small else "yes", value=format_bytes(size), advice=advice)


def _disk(runs: Path) -> Finding:
    folder = runs.absolute()
    while not folder.is_dir():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding(
            name="runs folder", state="no", value=f"{folder} is read-only", advice="choose another --runs"
        )
    free = shutil.disk_usage(folder).free
    small = free < _SMALL_DISK_BYTES
    advice = "records are small, but logs and snapshots are not" if small else ""
    return Finding(
        name="runs folder",
        state="warn" if small else "yes",
        value=f"{format_bytes(free)} free",
        advice=advice,
    )


def _software(probe: dict[str, Any]) -> tuple[Finding, ...]:
    torch = package_version("torch") or "not installed"
    build = probe.get("problem") or (
        f"CUDA {probe['cuda_built']}" if probe.get("cuda_built") else "CPU build"
    )
    findings = [
        Finding(name="torch", state="no" if "problem" in probe else "yes", value=f"{torch} ({build})")
    ]
    for name in ("gloo", "nccl"):
        problem = "not tried" if "problem" in probe else probe.get(name)
        findings.append(
            Finding(
                name=name, state="no" if problem else "yes", value=problem or "works (one-rank all-reduce)"
            )
        )
    flash = package_version("flash-attn")
    if flash:  # whoever has it may expect it to run
        unused = "installed, but not used: attention is torch's own kernels"
        findings.append(Finding(name="flash-attn", state="no", value=f"{flash} {unused}"))
    return tuple(findings)
