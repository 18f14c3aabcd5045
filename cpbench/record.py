"""A record: one measured case, with every sample and the facts needed to believe it.

The measured half gives one `RankReport` a rank; `Record.from_ranks` makes the record, its aggregates and its
sanity checks.  Sizes are bytes, durations seconds.  A missing number is None with a status that says why, never 0,
-1 or NaN.  `format_version` comes first in the file; a newer version than ours is refused by name.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cpbench.case import Case, Mode, OptionValue, Stack
from cpbench.errors import RecordError, RecordTooNew
from cpbench.hardware import fit, load_hardware
from cpbench.machine import Machine, peak_flops
from cpbench.model_config import ModelConfig

FORMAT_VERSION = 1

Status = Literal["ok", "oom_device", "oom_host", "unsupported", "timeout", "error", "invalid"]
STATUSES: tuple[Status, ...] = ("ok", "oom_device", "oom_host", "unsupported", "timeout", "error", "invalid")
INCOMPLETE: tuple[Status, ...] = ("error", "timeout")
"""Statuses that leave a question open: the sweep exits with 3, and `--resume` runs the case again."""


class _Facts(BaseModel):
    # Non-finite floats are refused in files: JSON has no spelling for them that every reader takes.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LiveTensor(_Facts):
    """One allocation alive at the peak."""

    bytes: int
    category: str
    phase: str
    """Where in the step it was allocated."""
    site: str
    """The operator or line that made it."""


class Memory(_Facts):
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


class StepSample(_Facts):
    """Durations of one timed step on one rank."""

    step_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float


class ModelledTime(_Facts):
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


class ShallowSteps(_Facts):
    """Steps of the same case with still fewer layers, from which its time is scaled to all of the model's."""

    layers: int
    step_seconds: tuple[float, ...]
    """Of each timed step."""


class RankReport(_Facts):
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


class Software(_Facts):
    """Versions in the measured process."""

    torch: str
    cuda: str | None = None
    nccl: str | None = None


class WorkerReport(_Facts):
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


class RankFailure(_Facts):
    """What a rank that could not finish says of it."""

    rank: int
    status: Status
    reason: str
    traceback: str = ""
    time: float
    """Unix time; the earliest failure of a case is its cause."""


class Spread(_Facts):
    """A quantity over the ranks."""

    max: float
    min: float
    mean: float
    rank: int
    """The rank that has the maximum."""


class Record(_Facts):
    """One case and what came of it; the columns of every table."""

    format_version: int = FORMAT_VERSION
    case_id: str
    mode: Mode
    status: Status
    reason: str | None = None
    """In words, for every status but ok."""
    warnings: tuple[str, ...] = ()
    """Doubts about an ok record, for example a rate above the hardware's peak."""
    notes: tuple[str, ...] = ()
    """What numbers of an ok record leave out, and why one is missing."""

    method: str
    options: dict[str, OptionValue]
    model: str
    seq_len: int
    world_size: int
    nodes: int
    ulysses_degree: int | None
    ring_degree: int | None
    batch_size: int
    dtype: str
    checkpoint: str
    offload: str
    tile_mlp: bool
    tile_norm: bool
    tile_loss: bool
    optimizer_offload: bool
    save_attention: int | str = 0
    """Blocks whose attention output waited in host memory; `auto` where the case could not be resolved."""
    host_budget_bytes: int | None = None
    """The budget asked for with `auto`, only where the case could not be resolved."""
    device: str
    hardware: str | None
    rank: int | None = None
    """The one rank that ran, of an emulated case or an estimate."""
    steps: int
    warmup: int
    seed: int
    architecture: ModelConfig
    """With the number of layers that ran."""
    model_layers: int | None = None
    """Layers that the model has, where fewer ran; sizes and durations are of those that ran, unless they say else."""

    machine: Machine | None
    gpu: str | None = None
    torch: str | None = None
    cuda: str | None = None
    nccl: str | None = None
    attention_backend: str | None = None
    cpbench_version: str
    git_commit: str | None
    method_source_hash: str | None
    started: str
    """UTC, ISO 8601."""
    duration_seconds: float
    """Wall time of the whole case, process start included."""

    peak_allocated_bytes: int | None = None
    """Headline: the maximum over ranks; `spread` has minimum, mean and the rank."""
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    non_torch_bytes: int | None = None
    host_rss_peak_bytes: int | None = None
    host_pinned_peak_bytes: int | None = None
    attention_intermediate_peak_bytes: int | None = None
    attention_forward_peak_bytes: int | None = None
    attention_backward_peak_bytes: int | None = None
    attention_stage_peak_bytes: int | None = None
    peak_by_category_bytes: dict[str, int] = Field(default_factory=dict)
    """Of the rank with the highest peak."""
    peak_by_phase_bytes: dict[str, int] = Field(default_factory=dict)
    """Maximum over ranks of each phase."""
    estimated_peak_bytes: int | None = None
    """Emulation only: `peak_allocated_bytes` by the estimate of the same case and rank."""
    spread: dict[str, Spread] = Field(default_factory=dict)
    """Over ranks, by name of the memory quantity."""

    step_seconds: float | None = None
    """Median over timed steps of the slowest rank's step; of an emulated case, its compute and its communication."""
    step_seconds_samples: tuple[float, ...] = ()
    """The slowest rank's duration of every timed step."""
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    optimizer_seconds: float | None = None
    compute_seconds: float | None = None
    """Emulation only: median over timed steps, measured, with copies on the device in place of communication."""
    communication_seconds: float | None = None
    """Emulation only: by how much communication would prolong a step, by the time model for `hardware`."""
    compute_seconds_of_model: float | None = None
    """Emulation of few layers only: `compute_seconds` on the line through two layer counts, at all of the model's."""
    tokens_per_second: float | None = None
    tokens_per_second_per_gpu: float | None = None
    """Per rank: a rank is a GPU, or a CPU process where device is cpu."""
    tflops_per_gpu: float | None = None
    """Model FLOPs (see `cpbench.model_config`) per second and rank, in 1e12."""
    mfu: float | None = None
    """tflops_per_gpu over the device's dense peak; None where the peak is not known."""
    modelled: ModelledTime | None = None
    """Of an estimate, whose durations come from a time model: how they arise, and how far they may be off."""
    loss: float | None = None
    """Mean loss after the last step."""
    losses: tuple[float | None, ...] = ()
    grad_norm: float | None = None
    grad_norms: tuple[float | None, ...] = ()
    collective_bytes: dict[str, int] = Field(default_factory=dict)
    """Maximum over ranks of the bytes sent in one step, by kind."""
    collective_calls: dict[str, int] = Field(default_factory=dict)
    ranks: tuple[RankReport, ...] = ()

    @property
    def stack(self) -> Stack:
        """The stack options as one object."""
        return Stack.model_validate({name: getattr(self, name) for name in Stack.model_fields})

    @classmethod
    def from_ranks(cls, case: Case, report: WorkerReport, facts: dict[str, Any]) -> Record:
        """Aggregate the ranks of a finished case.

        Args:
            case: the resolved case.
            report: one report a rank.
            facts: provenance fields (`machine, cpbench_version, git_commit, method_source_hash, started, ...`).

        Returns:
            A record with status ok, or invalid when a loss is not finite or a rate is above the hardware's peak.
        """
        ranks = sorted(report.ranks, key=lambda rank: rank.rank)
        memory = {name: _values(ranks, name) for name in _AGGREGATED_MEMORY}
        worst = max(ranks, key=lambda rank: rank.memory.peak_allocated_bytes or 0)
        steps = [[max(step) for step in zip(*samples, strict=True)] for samples in _timings(ranks)]
        apart = _apart(case, report, steps[0]) if case.mode == "emulate" else {}
        if apart:
            added = report.communication_seconds
            steps[0] = [] if added is None else [compute + added for compute in steps[0]]
        step_seconds = statistics.median(steps[0]) if steps[0] else None
        speed = _speed(case, step_seconds, report.gpu)
        status, reason, warnings = _judge(case, ranks, speed)
        fields: dict[str, Any] = dict(
            **_case_fields(case),
            **facts,
            **report.software.model_dump(),
            **{name: max(values) if values else None for name, values in memory.items()},
            **speed,
            **apart,
            status=status,
            reason=reason,
            warnings=tuple(warnings),
            notes=report.notes,
            estimated_peak_bytes=report.estimated_peak_bytes,
            gpu=report.gpu,
            attention_backend=ranks[0].attention_backend,
            peak_by_category_bytes=worst.memory.peak_by_category_bytes,
            peak_by_phase_bytes=_largest(rank.memory.peak_by_phase_bytes for rank in ranks),
            spread={name: _spread(values) for name, values in memory.items() if values},
            step_seconds=step_seconds,
            step_seconds_samples=tuple(steps[0]),
            forward_seconds=statistics.median(steps[1]) if steps[1] else None,
            backward_seconds=statistics.median(steps[2]) if steps[2] else None,
            optimizer_seconds=statistics.median(steps[3]) if steps[3] else None,
            modelled=ranks[0].modelled,
            loss=ranks[0].losses[-1] if ranks[0].losses else None,
            losses=ranks[0].losses,
            grad_norm=ranks[0].grad_norms[-1] if ranks[0].grad_norms else None,
            grad_norms=ranks[0].grad_norms,
            collective_bytes=_largest(rank.collective_bytes for rank in ranks),
            collective_calls=_largest(rank.collective_calls for rank in ranks),
            ranks=tuple(ranks),
        )
        return cls(**fields)

    @classmethod
    def without_result(cls, case: Case, status: Status, reason: str, facts: dict[str, Any]) -> Record:
        """Record a case that gave no numbers: OOM, unsupported, timeout, error or invalid, with the reason."""
        return cls(**_case_fields(case), **facts, status=status, reason=reason)

    def flat(self) -> dict[str, Any]:
        """Return one row for a dataframe: scalars as they are, the per-category and per-kind numbers as columns."""
        row = self.model_dump(mode="json", exclude={"ranks", "spread", "architecture", "machine"})
        for prefix, name in (
            ("category", "peak_by_category_bytes"),
            ("phase", "peak_by_phase_bytes"),
            ("collective", "collective_bytes"),
        ):
            row |= {f"{prefix}.{key}.bytes": value for key, value in row.pop(name).items()}
        row |= {f"collective.{key}.calls": value for key, value in row.pop("collective_calls").items()}
        for name, spread in self.spread.items():
            row |= {f"{name}.{part}": value for part, value in spread.model_dump().items() if part != "max"}
        modelled = row.pop("modelled") or {}
        for name in (
            "uncertainty",
            "exposed_communication_seconds",
            "exposed_copy_seconds",
            "computed_flops",
        ):
            row[f"modelled.{name}"] = modelled.get(name)
        row["options"] = json.dumps(self.options, sort_keys=True)
        for name in ("warnings", "notes", "step_seconds_samples", "losses", "grad_norms"):
            row[name] = json.dumps(row[name])
        row["machine"] = self.machine.name if self.machine else None
        row["num_params"] = self.architecture.num_params
        return row


_AGGREGATED_MEMORY = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "device_used_bytes",
    "non_torch_bytes",
    "host_rss_peak_bytes",
    "host_pinned_peak_bytes",
    "attention_intermediate_peak_bytes",
    "attention_forward_peak_bytes",
    "attention_backward_peak_bytes",
    "attention_stage_peak_bytes",
)


def read_record(path: Path) -> Record:
    """Load one record.

    Raises:
        RecordTooNew: a newer cpbench wrote it.
        RecordError: it cannot be read, is truncated, is not JSON or does not follow the schema.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"record {path} cannot be read: {error}") from error
    except ValueError as error:
        raise RecordError(f"record {path} is truncated or is not JSON: {error}") from error
    return parse_record(raw, source=str(path))


def parse_record(raw: object, *, source: str) -> Record:
    """Validate a record that was read from a file; errors as in `read_record`."""
    if not isinstance(raw, dict) or not isinstance(raw.get("format_version"), int):
        raise RecordError(f"record {source} has no format_version, so it is no cpbench record")
    if raw["format_version"] > FORMAT_VERSION:
        raise RecordTooNew(
            f"record {source} has format version {raw['format_version']}, but this cpbench reads up to "
            f"{FORMAT_VERSION}; update cpbench to read it"
        )
    try:
        return Record.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecordError(f"record {source} does not follow the schema: {where}: {first['msg']}") from error


def write_record(record: Record, path: Path) -> None:
    """Write a record to a temporary name beside `path`, then rename, so a reader never sees half a file."""
    # format_version first, then sorted, so that files diff well and a reader meets the version at once.
    body = record.model_dump(mode="json")
    ordered = {"format_version": body.pop("format_version"), **dict(sorted(body.items()))}
    write_text_atomically(path, json.dumps(ordered, indent=1, allow_nan=False) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either the old or the whole new content, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _case_fields(case: Case) -> dict[str, Any]:
    fields = {
        name: getattr(case, name) for name in Case.model_fields if name not in ("stack", "attention_backend")
    }
    return fields | case.stack.model_dump() | {"case_id": case.case_id}


def _values(ranks: Sequence[RankReport], name: str) -> list[int]:
    values = [getattr(rank.memory, name) for rank in ranks]
    return [] if None in values else values


def _spread(values: list[int]) -> Spread:
    top = max(values)
    return Spread(max=top, min=min(values), mean=statistics.fmean(values), rank=values.index(top))


def _largest(tables: Iterable[dict[str, int]]) -> dict[str, int]:
    result: dict[str, int] = {}
    for table in tables:
        for key, value in table.items():
            result[key] = max(value, result.get(key, value))
    return result


def _timings(ranks: Sequence[RankReport]) -> list[list[list[float]]]:
    parts: tuple[Callable[[StepSample], float], ...] = (
        lambda s: s.step_seconds,
        lambda s: s.forward_seconds,
        lambda s: s.backward_seconds,
        lambda s: s.optimizer_seconds,
    )
    return [[[part(sample) for sample in rank.samples] for rank in ranks] for part in parts]


def _apart(case: Case, report: WorkerReport, samples: Sequence[float]) -> dict[str, float | None]:
    """Measured compute and modelled communication of an emulated case."""
    compute = statistics.median(samples) if samples else None
    of_model = None
    shallow = report.ranks[0].shallow
    if compute is not None and shallow is not None and case.model_layers is not None:
        less = statistics.median(shallow.step_seconds)
        layers = case.architecture.num_layers
        per_layer = (compute - less) / (layers - shallow.layers)
        of_model = compute + per_layer * (case.model_layers - layers)
    return {
        "compute_seconds": compute,
        "communication_seconds": report.communication_seconds,
        "compute_seconds_of_model": of_model,
    }


def _speed(case: Case, step_seconds: float | None, gpu: str | None) -> dict[str, float | None]:
    names = ("tokens_per_second", "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu")
    if not step_seconds:
        return dict.fromkeys(names)
    tokens = case.seq_len * case.batch_size / step_seconds
    flops = case.architecture.step_flops(case.seq_len, case.batch_size) / step_seconds / case.world_size
    peak = peak_flops(gpu, case.dtype)
    if case.mode == "estimate" and case.hardware is not None:
        rates = load_hardware(case.hardware).rates
        peak = None if rates is None else rates.matmul_flops_per_second
    return dict(
        zip(
            names,
            (tokens, tokens / case.world_size, flops / 1e12, flops / peak if peak else None),
            strict=True,
        )
    )


def _judge_fit(case: Case, memory: Memory) -> tuple[Status, str | None, list[str]]:
    """Whether an estimate fits the hardware it is for; its numbers are kept either way."""
    found = fit(
        case,
        load_hardware(case.hardware or ""),
        peak_bytes=memory.peak_allocated_bytes or 0,
        host_bytes=memory.host_pinned_peak_bytes or 0,
    )
    return found.status, found.reason, []


def _judge(
    case: Case, ranks: Sequence[RankReport], speed: dict[str, float | None]
) -> tuple[Status, str | None, list[str]]:
    """Refuse what cannot be true; doubt what is unlikely."""
    for rank in ranks:
        for name, values in (("loss", rank.losses), ("gradient norm", rank.grad_norms)):
            if None in values:
                return (
                    "invalid",
                    f"the {name} of step {values.index(None)} on rank {rank.rank} is not finite",
                    [],
                )
    if len({rank.attention_backend for rank in ranks}) > 1:
        return "invalid", "ranks ran different attention kernels", []
    if case.mode == "measure" and len(ranks) != case.world_size:
        return "invalid", f"{len(ranks)} of {case.world_size} ranks reported", []
    if (
        case.mode == "estimate"
        and case.hardware is not None
        and ranks[0].memory.peak_allocated_bytes is not None
    ):
        return _judge_fit(case, ranks[0].memory)
    mfu = speed["mfu"]
    if mfu is not None and mfu > 1:
        return "invalid", f"MFU {mfu:.0%} is above the hardware's peak: the step did not do all its work", []
    asked, used = case.attention_backend, ranks[0].attention_backend
    if asked not in ("auto", used):
        return "invalid", f"attention backend {asked} was asked for but {used} ran", []
    # An emulated rank talks to itself, so its loss says nothing.
    first = ranks[0].losses[0] if ranks[0].losses and case.mode != "emulate" else None
    expected = math.log(case.architecture.vocab_size)
    if first is not None and abs(first - expected) > 0.25 * expected + 1:
        return "ok", None, [f"first loss {first:.3f} is far from ln(vocabulary) = {expected:.3f}"]
    return "ok", None, []
