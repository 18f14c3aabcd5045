"""What the checks on a GPU (`cpbench.gpu_checks`) have found, read from their folder, as a short table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cpbench.errors import CpbenchError, without_name
from cpbench.kernel_finding import KernelFinding, KernelFindings
from cpbench.rate_probe import RateProbe, RateProbes
from cpbench.record import Record, read_record
from cpbench.units import format_bytes, format_error, format_length, format_rate, format_seconds
from cpbench.verification import VerifyReport, title

RUNS = ("measured", "estimated", "fits", "would-fit", "throughput", "sweep-*")
"""Names of the runs of `cpbench sweep` that the checks make; patterns of names."""
BAR = (-0.01, 0.03)
"""Signed error of an estimate that is good enough: rather too high, never far too low."""


class Asked(Protocol):
    """What of the command line a table needs."""

    model: str
    layers: int
    world: int
    compare: Sequence[str]


@dataclass(frozen=True, slots=True)
class Findings:
    """The files of a folder of checks; what is not there was not found."""

    out: Path

    def measured_errors(self) -> dict[str, float]:
        """Return, by method, the signed error of the estimate of what was measured."""
        estimates = {r.method: r.peak_allocated_bytes for r in self.records("estimated") if r.status == "ok"}
        return {
            r.method: ((estimates[r.method] or 0) - r.peak_allocated_bytes) / r.peak_allocated_bytes
            for r in self.records("measured")
            if r.status == "ok" and r.peak_allocated_bytes and r.method in estimates
        }

    def fit_answers(self) -> list[tuple[Record, str]]:
        """Return each record of the fits step with the status that the estimate gives the same case."""
        stated = {r.seq_len: r.status for r in self.records("would-fit")}
        return [(r, stated.get(r.seq_len, "-")) for r in self.records("fits")]

    def verdicts(self) -> dict[str, list[tuple[str, str]]]:
        """Return, by verdict, the methods that `cpbench verify` found so, with the reason."""
        try:
            report = VerifyReport.model_validate_json((self.out / "verify.json").read_bytes())
        except (OSError, ValueError):
            return {}
        verdicts: dict[str, list[tuple[str, str]]] = {}
        for method in report.methods:
            reason = without_name(method.reason or "", method.method)
            verdicts.setdefault(method.verdict, []).append((title(method.method, method.given), reason))
        return verdicts

    def probes(self) -> list[RateProbe]:
        """Return what the rates step has measured."""
        try:
            return RateProbes.validate_json((self.out / "rates.json").read_bytes())
        except (OSError, ValueError):
            return []

    def kernels(self) -> list[KernelFinding]:
        """Return what the kernels step has found."""
        try:
            return KernelFindings.validate_json((self.out / "kernels.json").read_bytes())
        except (OSError, ValueError):
            return []

    def records(self, name: str) -> list[Record]:
        """Return the records of the runs of a name, which may be a pattern."""
        found = []
        for path in sorted(self.out.glob(f"{name}/cases/*.json")):
            try:
                found.append(read_record(path))
            except CpbenchError as error:
                sys.stdout.write(f"{error}\n")
        return sorted(found, key=lambda r: (r.seq_len, r.method))

    @property
    def failed(self) -> bool:
        """Whether an estimate is further off than it may be, or says that something fits that does not."""
        records = [record for name in RUNS for record in self.records(name)]
        errors = [*(r.estimate_error for r in records), *self.measured_errors().values()]
        refuted = any(r.status == "oom_device" and stated == "ok" for r, stated in self.fit_answers())
        return refuted or not all(map(_within, errors))


def table(found: Findings, given: Asked, took: Mapping[str, float]) -> str:
    """Return the short table of everything found.

    Args:
        found: in the folder of the found.
        given: what was asked for.
        took: seconds of each step that ran.
    """
    lines = ["", "kernels"]
    findings = found.kernels()
    for kernel in dict.fromkeys(finding.kernel for finding in findings):
        bad = [f"{f.shape}: {f.worst}" for f in findings if f.kernel == kernel and not f.passed]
        lines += [f"  {kernel}  {'FAIL' if bad else 'pass'}", *(f"    {words}" for words in bad)]
    lines += [] if findings else ["  not run"]
    lines += [
        "",
        "rates",
        *(f"  {line}" for line in [p.line for p in found.probes()] or ["not run"]),
    ]
    lines += ["", "verify, ranks as processes"]
    for verdict, methods in found.verdicts().items() or [("not run", [])]:
        lines.append(f"  {verdict}  {', '.join(name for name, _ in methods)}".rstrip())
        lines += [f"    {name}: {why}" for name, why in methods if verdict != "pass" and why]
    lines += ["", f"a world of one, measured, {given.model}, {given.layers} layers"]
    errors = found.measured_errors()
    for r in found.records("measured") or []:
        error = errors.get(r.method)
        mark = "" if _within(error) else " !"
        peak, step = format_bytes(r.peak_allocated_bytes), format_seconds(r.step_seconds)
        lines.append(
            f"  {r.method}  {format_length(r.seq_len)}  {r.status}  {peak}  {format_error(error)}{mark}  {step}"
        )
    lines += [] if found.records("measured") else ["  not run"]
    lines += ["", "what fits: ran, and estimated"]
    for r, stated in found.fit_answers():
        peak = format_bytes(r.peak_allocated_bytes)
        lines.append(f"  {r.method}  {format_length(r.seq_len)}  {r.status}  {stated}  {peak}")
    lines += [] if found.fit_answers() else ["  not run"]
    lines += ["", f"one rank of {given.world}, emulated, {given.model}"]
    head = ("method", "length", "layers", "status", "peak", "estimate", "error", "compute")
    rows = [_row(record) for record in found.records("sweep-*")]
    lines += _columns([head, *rows]) if rows else ["  not run"]
    lines += ["", "throughput, compute only (modelled communication is not in it)"]
    timed = [r for r in found.records("throughput") if r.compute_seconds is not None]
    rates = {r.method: r.seq_len * r.batch_size / r.world_size / (r.compute_seconds or 1.0) for r in timed}
    lines += [
        f"  {r.method}  {format_length(r.seq_len)}  {r.architecture.num_layers} layers  "
        f"{format_seconds(r.compute_seconds)}  {format_rate(rates[r.method])} tokens/s"
        for r in timed
    ] or ["  not run"]
    first, second = given.compare
    if first in rates and second in rates:
        lines.append(f"  {first} / {second} = {rates[first] / rates[second]:.3f}")
    lines += ["", "took " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items())]
    return "\n".join(lines) + "\n"


def outside(record: Record) -> bool:
    """Return whether the estimate of a record's peak is further off than it may be."""
    return not _within(record.estimate_error)


def _within(error: float | None) -> bool:
    return error is None or BAR[0] <= error <= BAR[1]


def _row(record: Record) -> tuple[str, ...]:
    mark = " !" if outside(record) else ""
    of = f"/{record.model_layers}" if record.model_layers else ""
    return (
        record.method,
        format_length(record.seq_len),
        f"{record.architecture.num_layers}{of}",
        record.status,
        format_bytes(record.peak_allocated_bytes),
        format_bytes(record.estimated_peak_bytes),
        f"{format_error(record.estimate_error)}{mark}",
        format_seconds(record.compute_seconds),
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
