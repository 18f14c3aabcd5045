"""Runs the cases of a plan one after another, estimates several at a time, and keeps a record of each.

A failed case is a record and the sweep goes on.  An interrupt ends the running case's processes, keeps every
finished record and leaves a run that `--resume` continues.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cpbench
from cpbench.disk import refusing_bad_disk
from cpbench.errors import RunFolderError, UsageError
from cpbench.estimate_pool import EstimatePool, suits
from cpbench.expand import Plan, ResolvedCase
from cpbench.interrupt import Interrupt
from cpbench.launch import ONE_NODE, POLL_SECONDS, WORKER, Exit, Job, Nodes, launch, read_progress
from cpbench.machine import Machine, this_machine
from cpbench.outcome import Outcome, explain, host_oom_kills
from cpbench.progress import Display
from cpbench.provenance import git_commit, versions
from cpbench.record import INCOMPLETE, Record, Status
from cpbench.run_folder import RunFolder, RunInfo, Session, now

INCOMPLETE_EXIT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """What a sweep leaves behind."""

    folder: Path
    records: tuple[Record, ...]
    """Of this run's plan, kept ones included, in order."""
    exit_code: int
    """0 done; 3 a case ended in error or timeout; 128 + signal interrupted."""
    remaining: int
    """Cases without a record because of an interrupt."""

    @property
    def counts(self) -> dict[Status, int]:
        """Records by status."""
        return dict(Counter(record.status for record in self.records))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A plan and everything needed to run it."""

    plan: Plan
    folder: RunFolder
    command: tuple[str, ...]
    """As typed; stored in run.json."""
    display: Display
    resume: bool = False
    nodes: Nodes = ONE_NODE
    worker: Sequence[str] = WORKER
    pool: EstimatePool = field(default_factory=EstimatePool)
    """Runs estimates at the same time; entered and left once."""

    def run(self) -> SweepResult:
        """Run every case that has no final record yet.

        Raises:
            RunFolderError: the run folder exists, is locked or cannot be written.
            RecordTooNew: it holds records of a newer cpbench.
        """
        if self.nodes.rank:
            return self._follow()
        with self.folder.opened(resume=self.resume), Interrupt() as interrupt:
            machine, commit = this_machine(), git_commit()
            info = self._start_info(machine, commit)
            kept, problems = self.folder.finished([item.case.case_id for item in self.plan.cases])
            self.folder.write_info(info)
            facts = {"machine": machine, "cpbench_version": cpbench.__version__, "git_commit": commit}
            records: list[Record] = []
            try:
                with self.display:
                    for problem in problems:
                        self.display.note(problem)
                    for record in self._records(kept, facts, interrupt):
                        records.append(record)
                        self.display.finished(record, kept=record.case_id in kept)
            except RunFolderError:
                raise
            except BaseException:
                self._finish(info, exit_code=1)
                raise
            result = self._result(records, interrupt)
            self._finish(info, exit_code=result.exit_code)
            return result

    def _records(
        self, kept: dict[str, Record], facts: dict[str, Any], interrupt: Interrupt
    ) -> Iterator[Record]:
        """Yield each case's record as it comes to be; those of earlier sweeps too."""
        todo: list[ResolvedCase] = []
        pooled = self._pooled(kept)
        for item in self.plan.cases:
            if interrupt.came:
                return
            record = kept.get(item.case.case_id)
            if record is None and item.unsupported:
                record = self._written(
                    item, Outcome(status="unsupported", reason=item.unsupported), facts, 0.0
                )
            if record is not None:
                yield record
            elif pooled:
                todo.append(item)
            elif (record := self._one(item, facts, interrupt)) is not None:
                yield record
        if todo:
            yield from self._together(todo, facts, interrupt)

    def _pooled(self, kept: dict[str, Record]) -> bool:
        """Whether a pool pays: one that is not warm takes longer to be ready than a single process."""
        todo = [
            item
            for item in self.plan.cases
            if not item.unsupported and item.case.case_id not in kept and suits(self._job(item))
        ]
        return len(todo) > 1 or (len(todo) == 1 and self.pool.warmed)

    def _one(self, item: ResolvedCase, facts: dict[str, Any], interrupt: Interrupt) -> Record | None:
        """Run one case and write its record; None when an interrupt came first."""
        facts = facts | {"started": now()}
        job = self._job(item)
        kills = host_oom_kills()
        exit = self._launch(job, interrupt)
        return None if exit.interrupted else self._concluded(item, job, exit, facts, kills)

    def _together(
        self, items: Sequence[ResolvedCase], facts: dict[str, Any], interrupt: Interrupt
    ) -> Iterator[Record]:
        """Run estimates, several at a time, and yield their records as they end."""
        waiting = list(reversed(items))
        running: dict[str, tuple[ResolvedCase, str, int]] = {}
        with self.pool as pool:
            while (waiting or running) and not interrupt.came:
                while waiting and pool.free:
                    item = waiting.pop()
                    running[item.case.case_id] = (item, now(), host_oom_kills())
                    self.display.started(item.case)
                    job = self._job(item)
                    with refusing_bad_disk(job.scratch):
                        pool.start(job)
                for job, exit in pool.wait(POLL_SECONDS):
                    item, started, kills = running.pop(job.case.case_id)
                    yield self._concluded(item, job, exit, facts | {"started": started}, kills)
                for job, seconds in pool.jobs:
                    self.display.waiting(job.case, read_progress(job), seconds)

    def _concluded(
        self, item: ResolvedCase, job: Job, exit: Exit, facts: dict[str, Any], kills: int
    ) -> Record:
        """Write and return the record of a case that has ended; `kills` by the kernel were there before."""
        outcome = explain(job, exit, oom_kills=host_oom_kills() - kills)
        record = self._written(item, outcome, facts, exit.duration_seconds)
        job.clean()
        return record

    def _written(
        self, item: ResolvedCase, outcome: Outcome, facts: dict[str, Any], duration_seconds: float
    ) -> Record:
        facts = {"started": now()} | facts
        facts |= {"method_source_hash": item.method_source_hash, "duration_seconds": duration_seconds}
        if outcome.report is not None:
            record = Record.from_ranks(item.case, outcome.report, facts)
        else:
            record = Record.without_result(item.case, outcome.status, outcome.reason or "", facts)
        self.folder.write(record)
        return record

    def _follow(self) -> SweepResult:
        """Take part in every case as a node that writes no records: node rank 0 does."""
        failed = 0
        with Interrupt() as interrupt, self.display:
            kept, _ = self.folder.finished(
                [item.case.case_id for item in self.plan.cases] if self.resume else []
            )
            todo = [
                item for item in self.plan.cases if not item.unsupported and item.case.case_id not in kept
            ]
            for item in todo:
                if interrupt.came:
                    break
                failed += self._launch(self._job(item), interrupt).code != 0
        code = 128 + interrupt.number if interrupt.number is not None else INCOMPLETE_EXIT if failed else 0
        return SweepResult(folder=self.folder.path, records=(), exit_code=code, remaining=0)

    def _launch(self, job: Job, interrupt: Interrupt) -> Exit:
        start = time.monotonic()
        self.display.started(job.case)
        return launch(
            job,
            should_stop=lambda: interrupt.came,
            on_wait=lambda: self.display.waiting(job.case, read_progress(job), time.monotonic() - start),
        )

    def _job(self, item: ResolvedCase) -> Job:
        case_id = item.case.case_id
        return Job(
            case=item.case,
            scratch=self.folder.scratch(case_id).absolute(),
            log_dir=self.folder.logs(case_id).absolute(),
            timeout_seconds=self.plan.scenario.run.timeout_seconds,
            plugins=self.plan.plugins,
            nodes=self.nodes,
            worker=self.worker,
        )

    def _result(self, records: list[Record], interrupt: Interrupt) -> SweepResult:
        order = {item.case.case_id: place for place, item in enumerate(self.plan.cases)}
        records = sorted(records, key=lambda record: order[record.case_id])
        remaining = len(self.plan.cases) - len(records)
        code = INCOMPLETE_EXIT if any(record.status in INCOMPLETE for record in records) else 0
        if interrupt.number is not None and remaining:
            code = 128 + interrupt.number
        return SweepResult(
            folder=self.folder.path, records=tuple(records), exit_code=code, remaining=remaining
        )

    def _start_info(self, machine: Machine, commit: str | None) -> RunInfo:
        ids = [item.case.case_id for item in self.plan.cases]
        session = Session(command=self.command, start=now())
        choice = self.plan.choice
        before = self.folder.read_info() if self.folder.info_file.exists() else None
        if before is None:
            return RunInfo(
                name=self.folder.path.name,
                command=self.command,
                scenario=self.plan.scenario,
                mode=choice.mode,
                device=choice.device,
                mode_reason=choice.reason,
                plugins=tuple(str(path) for path in self.plan.plugins),
                case_ids=tuple(ids),
                machine=machine,
                versions=versions(),
                git_commit=commit,
                start=session.start,
                sessions=(session,),
            )
        if (before.mode, before.device) != (choice.mode, choice.device):
            raise UsageError(
                f"run {before.name} is mode {before.mode} on {before.device}, but these flags give mode "
                f"{choice.mode} on {choice.device}; resume it with --resume --name alone, or choose another --name"
            )
        extra = [item.case.title for item in self.plan.cases if item.case.case_id not in before.case_ids]
        if extra:
            raise UsageError(
                f"run {before.name} does not have {len(extra)} of the requested cases (first: {extra[0]}); "
                "resume it with --resume --name alone, or choose another --name"
            )
        return before.model_copy(update={"sessions": (*before.sessions, session), "end": None})

    def _finish(self, info: RunInfo, *, exit_code: int) -> None:
        end = now()
        last = info.sessions[-1].model_copy(update={"end": end, "exit_code": exit_code})
        self.folder.write_tables()
        self.folder.write_info(info.model_copy(update={"end": end, "sessions": (*info.sessions[:-1], last)}))
