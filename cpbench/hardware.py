"""Machine profiles: what an estimate needs to know of hardware it does not run on.

A profile is a TOML file; every value has its source beside it.  Built-in ones lie in `cpbench/profiles/`; a user's own
is given by path.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from cpbench.case import Case
from cpbench.errors import UnknownName, UsageError
from cpbench.plain_words import problems_of
from cpbench.units import format_bytes

_FOLDER = Path(__file__).resolve().parent / "profiles"
MARGIN = 0.03
"""Part of the counted peak added for allocator rounding and fragmentation, so that an estimate is rather too high."""


class AttentionRates(BaseModel):
    """Speed of one attention kernel at head width 128: R t / (t + t_half) FLOP/s where a query meets t keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    forward_flops_per_second: PositiveFloat
    """R, where causal attention counts half of the square."""
    forward_half_keys: PositiveFloat
    """t_half: keys at which half of R is reached."""
    backward_flops_per_second: PositiveFloat
    """The same for the backward pass, of 2.5 times the FLOPs."""
    backward_half_keys: PositiveFloat


class Rates(BaseModel):
    """How fast the accelerator and its links are, for the time model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    uncertainty: float = Field(gt=0, lt=1)
    """Part by which a modelled step time may be off in either direction, judged from the sources."""
    matmul_flops_per_second: PositiveFloat
    """Dense bfloat16 peak."""
    matmul_efficiency: float = Field(gt=0, le=1)
    """Part of the peak that large matrix products reach."""
    memory_bytes_per_second: PositiveFloat
    """Peak of device memory."""
    memory_efficiency: float = Field(gt=0, le=1)
    """Part of it that an elementwise kernel reaches."""
    multiprocessors: PositiveInt
    """Units that a thread block runs on."""
    kernel_seconds: PositiveFloat
    """Shortest duration of a kernel."""
    link_bytes_per_second: PositiveFloat
    """What a collective sends from a GPU to others on its node."""
    link_latency_seconds: PositiveFloat
    """Of one hop of a collective inside a node."""
    network_bytes_per_second: PositiveFloat
    """What a GPU's network port sends to other nodes."""
    network_latency_seconds: PositiveFloat
    """Of one hop between nodes."""
    copy_out_bytes_per_second: PositiveFloat
    """From the device to pinned host memory."""
    copy_in_bytes_per_second: PositiveFloat
    """From pinned host memory to the device."""
    attention: dict[str, AttentionRates]
    """By attention backend."""


class Hardware(BaseModel):
    """One accelerator in its usual node."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    gpu: str
    """Name as the driver reports it."""
    gpus_per_node: PositiveInt
    device_memory_bytes: PositiveInt
    """All of a device's memory, as the driver reports it."""
    context_bytes: NonNegativeInt
    """What a process takes before its first tensor."""
    communicator_bytes: NonNegativeInt
    """What the collective library takes for each communicator."""
    host_memory_bytes: PositiveInt
    """RAM of a node."""
    rates: Rates | None = None
    """None: memory is estimated, time is not."""
    sources: dict[str, str]
    """Where each value is from."""


class Fit(BaseModel):
    """Whether a case fits, and what that was decided by."""

    model_config = ConfigDict(frozen=True)

    status: Literal["ok", "oom_device", "oom_host"]
    reason: str | None
    device_needed_bytes: int
    host_needed_bytes: int
    """Of a node."""


def profile_names() -> dict[str, Path]:
    """Return the built-in profiles by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.toml"))}


def load_hardware(name: str) -> Hardware:
    """Return a built-in profile, or the one in a TOML file.

    Raises:
        UnknownName: neither a profile nor a file.
        UsageError: the file is no profile.
    """
    known = profile_names()
    path = known.get(name) or Path(name)
    if name not in known and not path.is_file():
        raise UnknownName("hardware", name, known)
    try:
        return Hardware.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"hardware profile {path} cannot be read: {error}") from error
    except ValidationError as error:
        raise UsageError(f"hardware profile {path}: " + "\n  ".join(problems_of(error, Hardware))) from error


def fit(case: Case, hardware: Hardware, *, peak_bytes: int, host_bytes: int) -> Fit:
    """Return whether the estimated needs of a rank fit.

    Args:
        case: gives the ranks.
        hardware: the machine.
        peak_bytes: peak of the rank's tensors.
        host_bytes: pinned host memory of the rank.
    """
    communicators = 1 + ((case.ulysses_degree or 1) > 1) + ((case.ring_degree or 1) > 1)
    overhead = hardware.context_bytes + communicators * hardware.communicator_bytes
    device = round(peak_bytes * (1 + MARGIN)) + overhead
    host = host_bytes * min(case.world_size // case.nodes, hardware.gpus_per_node)
    status: Literal["ok", "oom_device", "oom_host"] = "ok"
    reason = None
    if device > hardware.device_memory_bytes:
        status = "oom_device"
        reason = _short("device memory", device, hardware.device_memory_bytes, "a rank")
    elif host > hardware.host_memory_bytes:
        status = "oom_host"
        reason = _short("host memory", host, hardware.host_memory_bytes, "a node")
    return Fit(status=status, reason=reason, device_needed_bytes=device, host_needed_bytes=host)


def _short(what: str, needed: int, there: int, per: str) -> str:
    return (
        f"{what}: {format_bytes(needed)} {per} needed (margin and overheads included), {format_bytes(there)} there, "
        f"short by {format_bytes(needed - there)}"
    )
