"""A record: one measured case, with every sample and the facts needed to believe it.

The measured half gives one `RankReport` a rank (`cpbench.rank_report`); `Record.from_ranks` makes the record, with
its aggregates and sanity checks (`cpbench.aggregate`). Sizes are bytes, durations seconds. A missing number is None
with a status that says why, never 0, -1 or NaN. `format_version` comes first in the file; a newer version than ours
is refused by name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from cpbench.aggregate import Spread, aggregates
from cpbench.case import Case, Mode, OptionValue, Stack
from cpbench.errors import RecordError, RecordTooNew
from cpbench.machine import Machine
from cpbench.model_config import ModelConfig
from cpbench.rank_report import (
    INCOMPLETE,
    STATUSES,
    Facts,
    LiveTensor,
    Memory,
    ModelledTime,
    RankFailure,
    RankReport,
    ShallowSteps,
    Software,
    Status,
    StepSample,
    WorkerReport,
)

FORMAT_VERSION = 1


class Record(Facts):
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
    host_memory_bytes: int | None = None
    """Of a node, where an estimate was judged by another than the profile's."""
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
    device_needed_bytes: int | None = None
    """Estimates for a machine profile: what a rank needs, margin and overheads included; decides whether it fits."""
    host_needed_bytes: int | None = None
    """The same of a node's host memory."""
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
    def estimate_error(self) -> float | None:
        """(estimated - measured) / measured peak of an emulated case; positive where the estimate is too high."""
        measured, estimate = self.peak_allocated_bytes, self.estimated_peak_bytes
        return None if not measured or estimate is None else (estimate - measured) / measured

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
        return cls(**_case_fields(case), **facts, **aggregates(case, report))

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


__all__ = [
    "FORMAT_VERSION",
    "INCOMPLETE",
    "STATUSES",
    "LiveTensor",
    "Memory",
    "ModelledTime",
    "RankFailure",
    "RankReport",
    "Record",
    "ShallowSteps",
    "Software",
    "Spread",
    "Status",
    "StepSample",
    "WorkerReport",
    "parse_record",
    "read_record",
    "write_record",
    "write_text_atomically",
]
