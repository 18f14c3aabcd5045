"""From the reports of ranks to the numbers of a record: maxima over ranks, medians over steps, rates, sanity checks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cpbench.case import Case
from cpbench.hardware import Fit, fit, load_hardware
from cpbench.machine import peak_flops
from cpbench.rank_report import Facts, RankReport, Status, StepSample, WorkerReport


class Spread(Facts):
    """A quantity over the ranks."""

    max: float
    min: float
    mean: float
    rank: int
    """The rank that has the maximum."""


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


def aggregates(case: Case, report: WorkerReport) -> dict[str, Any]:
    """Return the fields of a record that come from its ranks.

    Args:
        case: the resolved case.
        report: one report a rank.
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
    needs = _fit(case, ranks)
    status, reason, warnings = _judge(case, ranks, speed, needs)
    return dict(
        **report.software.model_dump(),
        **{name: max(values) if values else None for name, values in memory.items()},
        **speed,
        **apart,
        status=status,
        reason=reason,
        warnings=tuple(warnings),
        notes=report.notes,
        estimated_peak_bytes=report.estimated_peak_bytes,
        device_needed_bytes=None if needs is None else needs.device_needed_bytes,
        host_needed_bytes=None if needs is None else needs.host_needed_bytes,
        gpu=report.gpu,
        attention_backend=ranks[0].attention_backend,
        peak_by_category_bytes=worst.memory.peak_by_category_bytes,
        peak_by_phase_bytes=_largest(rank.memory.peak_by_phase_bytes for rank in ranks),
        spread={name: _spread(ranks, values) for name, values in memory.items() if values},
        step_seconds=step_seconds,
        step_seconds_samples=tuple(steps[0]),
        forward_seconds=statistics.median(steps[1]) if steps[1] else None,
        backward_seconds=statistics.median(steps[2]) if steps[2] else None,
        optimizer_seconds=statistics.median(steps[3]) if steps[3] else None,
        modelled=max(ranks, key=_seconds).modelled,
        loss=ranks[0].losses[-1] if ranks[0].losses else None,
        losses=ranks[0].losses,
        grad_norm=ranks[0].grad_norms[-1] if ranks[0].grad_norms else None,
        grad_norms=ranks[0].grad_norms,
        collective_bytes=_largest(rank.collective_bytes for rank in ranks),
        collective_calls=_largest(rank.collective_calls for rank in ranks),
        ranks=tuple(ranks),
    )


def _values(ranks: Sequence[RankReport], name: str) -> list[int]:
    values = [getattr(rank.memory, name) for rank in ranks]
    return [] if None in values else values


def _spread(ranks: Sequence[RankReport], values: list[int]) -> Spread:
    top = max(values)
    return Spread(max=top, min=min(values), mean=statistics.fmean(values), rank=ranks[values.index(top)].rank)


def _seconds(rank: RankReport) -> float:
    return sum(sample.step_seconds for sample in rank.samples)


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


def _fit(case: Case, ranks: Sequence[RankReport]) -> Fit | None:
    """Whether an estimate fits the hardware it is for, by the rank that needs most; None of anything else."""
    peaks = [rank.memory.peak_allocated_bytes for rank in ranks]
    if case.mode != "estimate" or case.hardware is None or None in peaks:
        return None
    return fit(
        case,
        load_hardware(case.hardware),
        peak_bytes=max(peak or 0 for peak in peaks),
        host_bytes=max(rank.memory.host_pinned_peak_bytes or 0 for rank in ranks),
    )


def _judge(
    case: Case, ranks: Sequence[RankReport], speed: dict[str, float | None], needs: Fit | None
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
    mfu = speed["mfu"]
    if mfu is not None and mfu > 1:
        return "invalid", f"MFU {mfu:.0%} is above the hardware's peak: the step did not do all its work", []
    if needs is not None:  # its numbers are kept either way
        return needs.status, needs.reason, []
    asked, used = case.attention_backend, ranks[0].attention_backend
    if asked not in ("auto", used):
        return "invalid", f"attention backend {asked} was asked for but {used} ran", []
    # An emulated rank talks to itself, so its loss says nothing.
    first = ranks[0].losses[0] if ranks[0].losses and case.mode != "emulate" else None
    expected = math.log(case.architecture.vocab_size)
    if first is not None and abs(first - expected) > 0.25 * expected + 1:
        return "ok", None, [f"first loss {first:.3f} is far from ln(vocabulary) = {expected:.3f}"]
    return "ok", None, []
