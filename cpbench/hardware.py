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
from cpbench.units import GIB, format_bytes

_FOLDER = Path(__file__).resolve().parent / "profiles"
HOST_MARGIN = 0.03
"""Part of a node's memory that ranks cannot pin.  The kernel describes each page of 4 KiB in 64 bytes (1.6 %) and maps
each pinned one in 8 (0.2 %); the rest is for the system's services and its file cache."""
HOST_PROCESS_BYTES = 3 * GIB
"""Host memory of a rank's process beside its pinned pool: interpreter, libraries, what the driver and the collectives
keep there.  Assumed: of a program of two lines that uses CUDA 2.0 GiB are reported (pytorch/pytorch issue 113326)."""
_STREAMS = 4  # compute, communication, copies out, copies in: the allocator keeps segments for each
_KEPT_TENSORS = 4 * 14  # of a layer: at most 14 parameters, each with a gradient and two optimizer states


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


class Allocator(BaseModel):
    """What PyTorch's caching allocator takes from the device beside the tensors themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rounding_bytes: PositiveInt
    """A block is a multiple of this."""
    small_segment_bytes: NonNegativeInt
    """What requests up to 1 MiB are cut from."""
    large_segment_bytes: NonNegativeInt
    """What requests between 1 and 10 MiB are cut from; larger ones have a segment each, a multiple of 2 MiB."""

    workspace_bytes: NonNegativeInt
    """What the library of matrix products keeps: a workspace for each thread that asks for products, and autograd's
    thread does so beside the program's."""

    def unused_bytes(self, layers: int) -> int:
        """Return what is reserved and holds no tensor, at most, without fragmentation.

        One segment of each kind is filled in part on every stream, and each block that stays for the whole step loses
        less than `rounding_bytes`.  Blocks that come and go are few at any time; the margin stands for them.
        """
        segments = _STREAMS * (self.small_segment_bytes + self.large_segment_bytes)
        return segments + _KEPT_TENSORS * layers * self.rounding_bytes


class Hardware(BaseModel):
    """One accelerator in its usual node."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    gpu: str
    """Name as the driver reports it."""
    gpus_per_node: PositiveInt
    device_memory_bytes: PositiveInt
    """All of a device's memory, as the driver reports it."""
    usable_memory_bytes: PositiveInt
    """What programs can have of it, as the runtime reports it; whether a case fits is judged by this."""
    margin: float = Field(ge=0, lt=1)
    """Part of the counted peak added for fragmentation and what operators allocate inside: rather too much than too
    little."""
    allocator: Allocator
    context_bytes: NonNegativeInt
    """What a process takes beside the allocator and the collectives: its context, and the kernels that it loads."""
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
    """Of a rank, with margin, context and communicators."""
    host_needed_bytes: int
    """Of a node, with the margin and what the ranks' processes take."""


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


def host_bytes_of(case: Case, hardware: Hardware) -> int:
    """Return the host memory of a node: what the case says, else the profile."""
    return case.host_memory_bytes or hardware.host_memory_bytes


def pinnable_bytes(case: Case, hardware: Hardware) -> int:
    """Return how much of a node's host memory is left for its ranks to pin; negative if their processes fill it."""
    there = host_bytes_of(case, hardware)
    return there - round(there * HOST_MARGIN) - _ranks_on_node(case, hardware) * HOST_PROCESS_BYTES


def nodes_of(world_size: int, hardware: Hardware) -> int:
    """Return the nodes that a number of ranks fills.

    Raises:
        UsageError: they fill some only in part.
    """
    size = hardware.gpus_per_node
    nodes = -(-world_size // size)
    if nodes > 1 and world_size % size:
        raise UsageError(
            f"--world {world_size} fills {nodes} nodes of {size} GPUs only in part; use a multiple of {size}"
        )
    return nodes


def fit(case: Case, hardware: Hardware, *, peak_bytes: int, host_bytes: int) -> Fit:
    """Return whether the estimated needs of a rank fit.

    Args:
        case: gives the ranks, and a node's host memory if that is not the profile's.
        hardware: the machine.
        peak_bytes: peak of the rank's tensors.
        host_bytes: pinned host memory of the rank.
    """
    communicators = 1 + ((case.ulysses_degree or 1) > 1) + ((case.ring_degree or 1) > 1)
    overhead = hardware.context_bytes + communicators * hardware.communicator_bytes
    overhead += hardware.allocator.unused_bytes(case.architecture.num_layers)
    device = round(peak_bytes * (1 + hardware.margin)) + overhead
    there = host_bytes_of(case, hardware)
    host = there - pinnable_bytes(case, hardware) + host_bytes * _ranks_on_node(case, hardware)
    status: Literal["ok", "oom_device", "oom_host"] = "ok"
    reason = None
    if device > hardware.usable_memory_bytes:
        status = "oom_device"
        what = f"{hardware.margin:.0%} margin, context, communicators and segments"
        reason = _short("device memory", device, hardware.usable_memory_bytes, "a rank", what)
    elif host > there:
        status = "oom_host"
        what = f"{HOST_MARGIN:.0%} of it and {format_bytes(HOST_PROCESS_BYTES)} a rank"
        reason = _short("host memory", host, there, "a node", f"{what} for system and processes")
    return Fit(status=status, reason=reason, device_needed_bytes=device, host_needed_bytes=host)


def _ranks_on_node(case: Case, hardware: Hardware) -> int:
    return min(case.world_size // case.nodes, hardware.gpus_per_node)


def _short(what: str, needed: int, there: int, per: str, included: str) -> str:
    return (
        f"{what}: {format_bytes(needed)} {per} needed (with {included}), {format_bytes(there)} there, "
        f"short by {format_bytes(needed - there)}"
    )
