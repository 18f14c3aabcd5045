"""What the measured processes say: one report a rank, and what a rank that failed says of it.

They go as files from the measured half to the orchestrator, and into the record as they are.  Sizes are bytes,
durations seconds; a missing number is None.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cpbench.case import Case

Status = Literal["ok", "oom_device", "oom_host", "unsupported", "timeout", "error", "invalid"]
STATUSES: tuple[Status, ...] = ("ok", "oom_device", "oom_host", "unsupported", "timeout", "error", "invalid")
INCOMPLETE: tuple[Status, ...] = ("error", "timeout")
"""Statuses that leave a question open: the sweep exits with 3, and `--resume` runs the case again."""


class Facts(BaseModel):
    """Read-only, no unknown keys."""

    # Non-finite floats are refused in files: JSON has no spelling for them that every reader takes.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LiveTensor(Facts):
    """One allocation alive at the peak."""

    bytes: int
    category: str
    phase: str
    """Where in the step it was allocated."""
    site: str
    """The operator or line that made it."""


class Memory(Facts):
    """What one rank's allocators and the operating system say, over one training step unless stated."""

    peak_allocated_bytes: int | None = None
    """Peak of bytes in live device tensors (on CPU: the CPU allocator's own events)."""
    peak_reserved_bytes: int | None = None
    """Peak of bytes the caching allocator held from the driver (CUDA only)."""
    device_used_bytes: int | None = None
    """NVML: bytes in use on the device by all processes, after the step (CUDA only)."""
    non_torch_bytes: int | None = None
    """device_used - reserved: context, NCCL, libraries (CUDA only)."""
    host_rss_peak_bytes: int | None = None
    """Peak resident set of the process, since it started."""
    host_pinned_peak_bytes: int | None = None
    """Peak of bytes in the pinned host pool."""
    attention_intermediate_peak_bytes: int | None = None
    """Peak of what an attention block holds beyond its input and output (and their gradients)."""
    attention_forward_peak_bytes: int | None = None
    """The same, forward only."""
    attention_backward_peak_bytes: int | None = None
    """The same, backward only: recomputed and saved intermediates included."""
    attention_stage_peak_bytes: int | None = None
    """Intermediates but for an attention output, or its gradient, held at full width, and but for kernel scratch."""
    peak_by_category_bytes: dict[str, int] = Field(default_factory=dict)
    """Live bytes of each category at the moment of the peak; they add up to peak_allocated_bytes."""
    peak_by_phase_bytes: dict[str, int] = Field(default_factory=dict)
    """Peak allocated in each phase: forward, backward, optimizer."""
    alloc_retries: int | None = None
    """Times the caching allocator had to flush and retry (CUDA only)."""
    largest_at_peak: tuple[LiveTensor, ...] = ()
    """The largest allocations alive at the peak, largest first."""


class StepSample(Facts):
    """Durations of one timed step on one rank."""

    step_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float


class ModelledTime(Facts):
    """What a time model says of a step beside its duration (see `cpbench.timing.schedule`); seconds."""

    uncertainty: float
    """Part by which the step time may be off in either direction, as judged from the sources of the profile's rates."""
    exposed_communication_seconds: float
    """Time in which compute waits for collectives."""
    exposed_copy_seconds: float
    """Time in which compute waits for copies to or from host memory."""
    busy_seconds: dict[str, float]
    """Time in which each stream works."""
    critical_path_seconds: dict[str, float]
    """What the step consists of, by `phase/kind of work`, along the chain that makes it as long as it is."""
    computed_flops: float
    """FLOPs of this rank's matrix products and attention, recomputation included."""


class ShallowSteps(Facts):
    """Steps of the same case with still fewer layers, from which its time is scaled to all of the model's."""

    layers: int
    step_seconds: tuple[float, ...]
    """Of each timed step."""


class RankReport(Facts):
    """Everything one rank measured."""

    rank: int
    memory: Memory
    samples: tuple[StepSample, ...]
    warmup_seconds: tuple[float, ...] = ()
    """Durations of the steps before the timed ones; in no aggregate."""
    losses: tuple[float | None, ...]
    """Mean loss over the global batch after each step, warm-up included; None where it was not finite."""
    grad_norms: tuple[float | None, ...]
    """Global gradient norm before clipping, the same steps."""
    collective_bytes: dict[str, int] = Field(default_factory=dict)
    """Bytes this rank sends to others in one step, by kind of collective (see `cpbench.runtime.collectives`)."""
    collective_calls: dict[str, int] = Field(default_factory=dict)
    """Number of collectives in one step, by kind."""
    collectives_hash: str | None = None
    """Of the kinds and bytes of all collectives of a step in their order; None in an estimate."""
    shallow: ShallowSteps | None = None
    """Of an emulated case that runs fewer layers than the model has."""
    attention_backend: str
    """The kernel that really ran."""
    modelled: ModelledTime | None = None
    """Of an estimate: its `samples` hold one modelled step."""


class Software(Facts):
    """Versions in the measured process."""

    torch: str
    cuda: str | None = None
    nccl: str | None = None


class WorkerReport(Facts):
    """What the measured processes of a case hand to the orchestrator."""

    ranks: tuple[RankReport, ...]
    software: Software
    gpu: str | None = None
    communication_seconds: float | None = None
    """Emulation only: by how much communication would prolong a step, by the time model."""
    estimated_peak_bytes: int | None = None
    """Emulation only: `peak_allocated_bytes` by the estimate."""
    notes: tuple[str, ...] = ()
    """See `Record.notes`."""


class CaseReport(Facts):
    """What comes of a case that is resolved and run in one go."""

    case: Case
    """Resolved, as far as it could be."""
    report: WorkerReport | None = None
    unsupported: str | None = None
    """Why it cannot run; None beside a report."""


class RankFailure(Facts):
    """What a rank that could not finish says of it."""

    rank: int
    status: Status
    reason: str
    traceback: str = ""
    time: float
    """Unix time; the earliest failure of a case is its cause."""
