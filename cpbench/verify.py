"""Runs `cpbench verify`: real ranks under torchrun check each method against the reference.

All methods share one launch; if that ends without an answer (a rank died or hung), each method is run alone, so that
only the faulty one is blamed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from cpbench import registry
from cpbench.case import STACKS, Case, Device, Dtype, OptionValue
from cpbench.errors import UsageError
from cpbench.expand import ResolvedCase, excess, resolve_cases
from cpbench.launch import Job, launch
from cpbench.machine import visible_gpus
from cpbench.model_config import ModelConfig
from cpbench.outcome import explain, host_oom_kills
from cpbench.verification import Verification, VerifyReport

_WORKER = ("-m", "cpbench.verify_worker")


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyRequest:
    """What to verify, at which shape."""

    methods: tuple[str, ...]
    options: Mapping[str, Sequence[Mapping[str, OptionValue]]] = field(default_factory=dict)
    """Option sets by method; a method without any runs with its defaults."""
    world_size: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    hidden_dim: int = 192
    num_layers: int = 2
    seq_len: int | None = None
    """None: 26 tokens a rank, an odd multiple of what every layout needs."""
    batch_size: int = 1
    qk_norm: bool = False
    dtype: Dtype = "float32"
    device: Device = "cpu"
    seed: int = 0
    plugins: tuple[Path, ...] = ()
    timeout_seconds: float = 600.0

    def cases(self) -> list[Case]:
        """Return the requested cases.

        Raises:
            UsageError: heads that do not divide, or another shape that no model has.
        """
        try:
            architecture = ModelConfig(
                hidden_dim=self.hidden_dim,
                num_layers=self.num_layers,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                ffn_dim=2 * self.hidden_dim - 40,
                vocab_size=509,
                qk_norm=self.qk_norm,
            )
        except ValidationError as error:
            raise UsageError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        return [
            Case(
                method=method,
                options=dict(options),
                model="verify",
                architecture=architecture,
                seq_len=self.seq_len or 26 * self.world_size,
                batch_size=self.batch_size,
                world_size=1 if method == "single" else self.world_size,
                dtype=self.dtype,
                stack=STACKS["long"],
                device=self.device,
                seed=self.seed,
            )
            for method in self.methods
            for options in self.options.get(method) or [{}]
        ]


def verify(request: VerifyRequest, *, should_stop: Callable[[], bool] = lambda: False) -> VerifyReport:
    """Verify every requested method and return the findings.

    Args:
        request: methods and shape.
        should_stop: asked now and then; True ends the processes.

    Raises:
        UsageError: a name, option or shape is wrong, or no requested method can run the shape (with every reason).
    """
    for name in dict.fromkeys((*request.methods, *request.options)):
        registry.require(name, request.plugins)
    resolved = resolve_cases(request.cases(), request.plugins)
    gpus = len(visible_gpus()[0])
    limited = [
        r if r.unsupported else r.model_copy(update={"unsupported": excess(r.case, gpus=gpus)})
        for r in resolved
    ]
    if all(item.unsupported for item in limited):
        lines = dict.fromkeys(f"{item.case.method}: {item.unsupported}" for item in limited)
        raise UsageError("none of the requested methods can run this shape:\n  " + "\n  ".join(lines))
    found: dict[str, Verification] = {}
    for item in limited:
        if item.unsupported:
            found[item.case.case_id] = _no_result(item.case, "unsupported", item.unsupported)
    shape: dict[str, int | str] = {}
    for size in sorted({item.case.world_size for item in limited if not item.unsupported}, reverse=True):
        group = [item for item in limited if not item.unsupported and item.case.world_size == size]
        report = _launched(group, request, should_stop)
        shape = shape or report.shape
        found |= {item.case.case_id: result for item, result in zip(group, report.results, strict=True)}
    return VerifyReport(shape=shape, results=tuple(found[item.case.case_id] for item in limited))


def _launched(
    group: Sequence[ResolvedCase], request: VerifyRequest, should_stop: Callable[[], bool]
) -> VerifyReport:
    """Run methods of one world size together, or one by one when that gives no answer."""
    with tempfile.TemporaryDirectory(prefix="cpbench-verify-") as folder:
        job = Job(
            case=group[0].case,
            scratch=Path(folder) / "scratch",
            log_dir=Path(folder) / "logs",
            timeout_seconds=request.timeout_seconds,
            plugins=tuple(path.absolute() for path in request.plugins),
            worker=_WORKER,
            extra={"cases": [item.case.model_dump(mode="json") for item in group]},
        )
        kills = host_oom_kills()
        ended = launch(job, should_stop=should_stop)
        if ended.interrupted:
            raise KeyboardInterrupt
        answer = job.folder / "report.json"
        if ended.code == 0 and answer.is_file():
            return VerifyReport.model_validate_json(answer.read_text(encoding="utf-8"))
        outcome = explain(job, ended, oom_kills=host_oom_kills() - kills)
    if len(group) == 1:
        verdict = "unsupported" if outcome.status == "unsupported" else "error"
        return VerifyReport(
            shape={}, results=(_no_result(group[0].case, verdict, outcome.reason or outcome.status),)
        )
    reports = [_launched([item], request, should_stop) for item in group]
    shape = next((report.shape for report in reports if report.shape), {})
    return VerifyReport(shape=shape, results=tuple(report.results[0] for report in reports))


def _no_result(case: Case, verdict: str, reason: str) -> Verification:
    return Verification.model_validate(
        {"method": case.method, "options": case.options, "verdict": verdict, "reason": reason}
    )
