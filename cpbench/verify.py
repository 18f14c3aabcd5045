"""Runs `cpbench verify`: real ranks under torchrun check each method against the references.

Everything shares one launch, because starting processes costs more than most checks.  If that ends early (a rank died
or hung), what it had found is kept, the case that ran is blamed, its method and options are not run again, and the
rest is launched once more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from cpbench import registry
from cpbench.case import STACKS, Case, Device, OptionValue
from cpbench.errors import UsageError, without_name
from cpbench.expand import ResolvedCase, excess, resolve_cases
from cpbench.launch import Job, launch
from cpbench.machine import visible_gpus
from cpbench.outcome import explain, host_oom_kills
from cpbench.progress_file import read_progress
from cpbench.selection import Selection
from cpbench.shape import Shape
from cpbench.verification import (
    Verdict,
    Verification,
    VerifyAnswer,
    VerifyItem,
    VerifyReport,
)

_WORKER = ("-m", "cpbench.verify_worker")
_ANSWERS = "answers.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyRequest:
    """What to verify."""

    methods: tuple[str, ...]
    selection: Selection
    """Shapes, stacks, and where the declared option sets run."""
    options: Mapping[str, Sequence[Mapping[str, OptionValue]]] = field(default_factory=dict)
    """Option sets by method, which run at every shape instead of those that the method declares."""
    device: Device = "cpu"
    seed: int = 0
    plugins: tuple[Path, ...] = ()
    timeout_seconds: float = 3600.0
    """For one launch."""
    collective_seconds: float = 120.0
    """After so long a rank that waits for another gives up."""

    def items(self) -> list[VerifyItem]:
        """Return what is to be verified, shape by shape.

        Raises:
            UsageError: a shape that no model has, for example because heads do not divide.
        """
        found = []
        for shape in dict.fromkeys(self.selection.shapes):
            for method in self.methods:
                for position, options in enumerate(self._option_sets(method, shape)):
                    stacks = self.selection.stacks.get(shape, ())
                    found.append(
                        VerifyItem(
                            case=self._case(method, options, shape),
                            given=dict(options),
                            stacks=stacks if position == 0 else stacks[-1:],
                            count=shape in self.selection.counted and (position == 0 or bool(stacks)),
                        )
                    )
        return found

    def _option_sets(self, method: str, shape: Shape) -> Sequence[Mapping[str, OptionValue]]:
        if self.options.get(method):
            return self.options[method]
        declared = registry.verify_options(registry.require(method, self.plugins))
        return declared if shape in self.selection.thorough else declared[:1]

    def _case(self, method: str, options: Mapping[str, OptionValue], shape: Shape) -> Case:
        return Case(
            method=method,
            options=dict(options),
            model="verify",
            architecture=shape.architecture(),
            seq_len=shape.seq_len,
            batch_size=shape.batch_size,
            world_size=1 if method == "single" else shape.world_size,
            dtype=shape.dtype,
            stack=STACKS["long"],
            device=self.device,
            seed=self.seed,
        )


class Display(Protocol):
    """Shows a verification while it runs."""

    def started(self, total: int, unsupported: int) -> None:
        """So many cases are going to be checked."""

    def running(self, phase: str) -> None:
        """What runs now; called about ten times a second."""

    def finished(self, result: Verification) -> None:
        """A case has its findings."""


def verify(
    request: VerifyRequest, *, display: Display | None = None, should_stop: Callable[[], bool] = lambda: False
) -> VerifyReport:
    """Verify every requested method at every requested shape and return the findings.

    Args:
        request: methods and shapes.
        display: told of the progress.
        should_stop: asked now and then; True ends the processes.

    Raises:
        UsageError: a name, option or shape is wrong, or no requested method can run any shape (with every reason).
    """
    for name in dict.fromkeys((*request.methods, *request.options)):
        registry.require(name, request.plugins)
    items = request.items()
    resolved = _resolved(items, request)
    if all(item.unsupported for item in resolved):
        lines = dict.fromkeys(
            f"{item.case.method}: {without_name(item.unsupported or '', item.case.method)}"
            for item in resolved
        )
        raise UsageError("none of the requested methods can run this shape:\n  " + "\n  ".join(lines))
    resolved_items = [
        asked.model_copy(update={"case": item.case}) for asked, item in zip(items, resolved, strict=True)
    ]
    found: dict[int, Verification] = {}
    for index, item in enumerate(resolved):
        if item.unsupported:
            found[index] = _no_result(resolved_items[index], "unsupported", item.unsupported)
    waiting = {index: item for index, item in enumerate(resolved_items) if index not in found}
    if display is not None:
        display.started(len(waiting), len(found))
    found |= _Launches(request, display, should_stop).run(waiting)
    methods = {name: position for position, name in enumerate(request.methods)}
    ordered = sorted(found, key=lambda index: (methods[found[index].method], index))
    results = [found[index] for index in ordered]
    return VerifyReport.of(request.device, results, gpus=len(visible_gpus()[0]))


def _resolved(items: Sequence[VerifyItem], request: VerifyRequest) -> list[ResolvedCase]:
    gpus = len(visible_gpus()[0])
    if gpus:  # fewer than ranks: they share one (`cpbench.parity.shared_gpu`)
        gpus = max(gpus, *(item.case.world_size for item in items))
    return [
        item if item.unsupported else item.model_copy(update={"unsupported": excess(item.case, gpus=gpus)})
        for item in resolve_cases([item.case for item in items], request.plugins)
    ]


@dataclass(frozen=True, slots=True)
class _Launches:
    """Launches until every item has an answer."""

    request: VerifyRequest
    display: Display | None
    should_stop: Callable[[], bool]

    def run(self, items: Mapping[int, VerifyItem]) -> dict[int, Verification]:
        found: dict[int, Verification] = {}
        waiting = dict(items)
        while waiting:
            answers, begun, reason = self._launch(waiting)
            found |= answers
            waiting = {index: item for index, item in waiting.items() if index not in answers}
            last = max(answers, default=None)
            bad: list[int] = []
            if waiting and last is not None and answers[last].verdict == "error":
                bad = [last]  # the ranks stopped there, or lost one another while rank 0 wrote the answer
            elif waiting and reason is not None:
                # Before the first case nothing tells the methods apart; later, the case that ran is to blame.
                blamed = [next(iter(waiting))] if begun else list(waiting)
                for index in blamed:
                    self._found(found, index, _no_result(waiting.pop(index), "error", reason))
                bad = blamed
            for index in bad:
                self._give_up(found, waiting, items[index].case)
        return found

    def _give_up(self, found: dict[int, Verification], waiting: dict[int, VerifyItem], culprit: Case) -> None:
        """Do not run a method and options again that have broken a launch."""
        words = f"not run, because the processes did not survive {Shape.of(culprit).title}"
        for index, item in list(waiting.items()):
            if (item.case.method, item.case.options) == (culprit.method, culprit.options):
                self._found(found, index, _no_result(waiting.pop(index), "error", words))

    def _found(self, found: dict[int, Verification], index: int, result: Verification) -> None:
        found[index] = result
        if self.display is not None:
            self.display.finished(result)

    def _launch(self, items: Mapping[int, VerifyItem]) -> tuple[dict[int, Verification], bool, str | None]:
        """Return (answers, whether a case had begun, what ended the launch: None if the ranks did)."""
        positions = list(items)
        request = self.request
        with tempfile.TemporaryDirectory(prefix="cpbench-verify-") as folder:
            job = Job(
                case=max((item.case for item in items.values()), key=lambda case: case.world_size),
                scratch=Path(folder) / "scratch",
                log_dir=Path(folder) / "logs",
                timeout_seconds=request.timeout_seconds,
                plugins=tuple(path.absolute() for path in request.plugins),
                worker=_WORKER,
                extra={
                    "items": [item.model_dump(mode="json") for item in items.values()],
                    "collective_seconds": request.collective_seconds,
                },
            )
            answers = _Answers(job.folder / _ANSWERS)
            kills = host_oom_kills()
            ended = launch(job, should_stop=self.should_stop, on_wait=lambda: self._show(job, answers))
            if ended.interrupted:
                raise KeyboardInterrupt
            self._show(job, answers)
            progress = read_progress(job.folder)
            begun = bool(answers.found) or (
                progress is not None and not progress.phase.startswith("counting")
            )
            found = {positions[answer.index]: answer.result for answer in answers.found}
            if ended.code == 0:
                return found, begun, None if found else "the ranks ended without an answer"
            outcome = explain(job, ended, oom_kills=host_oom_kills() - kills)
            return found, begun, outcome.reason or outcome.status

    def _show(self, job: Job, answers: _Answers) -> None:
        new = answers.read()
        if self.display is None:
            return
        for answer in new:
            self.display.finished(answer.result)
        progress = read_progress(job.folder)
        self.display.running("starting the processes" if progress is None else progress.phase)


@dataclass(slots=True)
class _Answers:
    """The file that rank 0 adds lines to."""

    path: Path
    found: list[VerifyAnswer] = field(default_factory=list)

    def read(self) -> Iterable[VerifyAnswer]:
        """Return the answers since the last call."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        known = len(self.found)
        for line in lines[known:]:
            try:
                self.found.append(VerifyAnswer.model_validate_json(line))
            except ValidationError:  # half a line, still being written
                break
        return self.found[known:]


def _no_result(item: VerifyItem, verdict: Verdict, reason: str) -> Verification:
    case = item.case
    return Verification(
        method=case.method,
        options=case.options,
        given=item.given,
        shape=Shape.of(case),
        verdict=verdict,
        reason=reason,
    )
