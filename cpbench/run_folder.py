"""The folder of a run: what is where, who may write it, and what a resumed sweep may skip.

run.json                    what was asked, where and when (`RunInfo`)
cases/<case-id>.json        one record, written to a temporary name and renamed
logs/<case-id>/             rank<k>.log, launcher.log
records.parquet, .csv       derived from cases/, one row a case
scratch/                    files of running cases; empty between cases
sweep.sbatch, slurm-*.log   of a run that Slurm starts: there before anything else
.lock                       held by the sweep that writes here
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError, field_serializer

from cpbench.case import Device, Mode
from cpbench.disk import refusing_bad_disk
from cpbench.errors import RecordError, RecordTooNew, RunFolderError, UsageError
from cpbench.machine import Machine
from cpbench.record import INCOMPLETE, Record, read_record, write_record, write_text_atomically
from cpbench.scenario import Scenario

RUN_FORMAT_VERSION = 1
SBATCH_FILE = "sweep.sbatch"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")


class Session(BaseModel):
    """One start of the sweep; a resumed run has several."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: tuple[str, ...]
    start: str
    """UTC, ISO 8601."""
    end: str | None = None
    """None while it runs, and after a crash."""
    exit_code: int | None = None


class RunInfo(BaseModel):
    """run.json: everything a run shares between its records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = RUN_FORMAT_VERSION
    name: str
    command: tuple[str, ...]
    """As typed, of the first start."""
    scenario: Scenario
    """With flags applied, and mode and device as chosen."""
    mode: Mode
    device: Device
    mode_reason: str
    plugins: tuple[str, ...] = ()
    case_ids: tuple[str, ...]
    """Every case of the run, in order."""
    machine: Machine
    versions: dict[str, str]
    git_commit: str | None
    start: str
    end: str | None = None
    sessions: tuple[Session, ...] = ()

    @field_serializer("scenario")
    def _without_unset_keys(self, scenario: Scenario) -> dict[str, Any]:
        # A rule or change that does not name a key means "any"; null is no value a scenario may hold.
        return scenario.model_dump(mode="json", exclude_none=True)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run and the operations on them; see the module docstring for the layout."""

    path: Path

    @property
    def info_file(self) -> Path:
        """run.json."""
        return self.path / "run.json"

    @property
    def cases(self) -> Path:
        """Folder of the records."""
        return self.path / "cases"

    def record_file(self, case_id: str) -> Path:
        """Where the record of a case is, or will be."""
        return self.cases / f"{case_id}.json"

    def logs(self, case_id: str) -> Path:
        """Folder of the logs of a case."""
        return self.path / "logs" / case_id

    def scratch(self, case_id: str) -> Path:
        """Folder for the files a running case exchanges with its processes."""
        return self.path / "scratch" / case_id

    @contextmanager
    def opened(self, *, resume: bool) -> Iterator[None]:
        """Create the folder, or take it up again, and hold its lock.

        Raises:
            RunFolderError: it exists and `resume` is False; another sweep holds it; it cannot be written.
        """
        self._refuse_foreign()
        with refusing_bad_disk(self.path):
            self.cases.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RunFolderError(
                    f"another sweep is writing to {self.path}; wait for it, or choose another --name"
                ) from None
        try:
            self.check(resume=resume)
            yield
        finally:
            shutil.rmtree(self.path / "scratch", ignore_errors=True)
            lock.release()

    def check(self, *, resume: bool) -> None:
        """Refuse a folder that a sweep must not write to; nothing is created.

        Raises:
            RunFolderError: it holds a run and `resume` is False, or it holds something else.
        """
        self._refuse_foreign()
        if not resume and (self.info_file.exists() or any(self.cases.glob("*"))):
            raise RunFolderError(
                f"run folder {self.path} exists; continue it with --resume, or choose another --name"
            )

    def write_info(self, info: RunInfo) -> None:
        """Write run.json."""
        with refusing_bad_disk(self.path):
            write_text_atomically(self.info_file, json.dumps(info.model_dump(mode="json"), indent=1) + "\n")

    def read_info(self) -> RunInfo:
        """Return run.json.

        Raises:
            RunFolderError: it is missing, malformed, or of a newer format.
        """
        return read_run_info(self.info_file)

    def write(self, record: Record) -> None:
        """Write one record.

        Raises:
            RunFolderError: the disk is full or the folder became unwritable; earlier records are safe.
        """
        with refusing_bad_disk(self.path):
            write_record(record, self.record_file(record.case_id))

    def read_all(self) -> tuple[list[Record], list[str]]:
        """Return every readable record in order of file name, and what is wrong with the others."""
        records: list[Record] = []
        problems: list[str] = []
        for file in sorted(self.cases.glob("*.json")):
            try:
                records.append(read_record(file))
            except RecordError as error:
                problems.append(str(error))
        return records, problems

    def finished(self, case_ids: Sequence[str]) -> tuple[dict[str, Record], list[str]]:
        """Return the records a resumed sweep keeps, by case id, and why others are run again.

        Raises:
            RecordTooNew: rerunning the case would overwrite what a newer cpbench wrote.
        """
        kept: dict[str, Record] = {}
        problems: list[str] = []
        for case_id in case_ids:
            file = self.record_file(case_id)
            if not file.exists():
                continue
            try:
                record = read_record(file)
            except RecordTooNew:
                raise
            except RecordError as error:
                problems.append(f"{error}; the case is run again")
                continue
            if record.status not in INCOMPLETE:
                kept[case_id] = record
        return kept, problems

    def write_tables(self) -> None:
        """Derive records.parquet and records.csv from the records; whole files or the old ones."""
        from cpbench.report.frame import typed_frame

        records, _ = self.read_all()
        if not records:
            return
        frame = typed_frame([record.flat() for record in records])
        with refusing_bad_disk(self.path):
            for name, write in (("records.parquet", _to_parquet), ("records.csv", _to_csv)):
                temporary = self.path / f".{name}.{os.getpid()}.tmp"
                try:
                    write(frame, temporary)
                    temporary.replace(self.path / name)
                finally:
                    temporary.unlink(missing_ok=True)

    def _refuse_foreign(self) -> None:
        """Never write into a folder that holds something other than a run."""
        try:
            names = {entry.name for entry in self.path.iterdir()}
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunFolderError(
                f"run folder {self.path} cannot be read ({error.strerror}); choose another place with --runs"
            ) from error
        if names and not names & {"run.json", "cases", SBATCH_FILE}:
            raise RunFolderError(
                f"{self.path} is not empty and holds no run; choose another --name or --runs"
            )


def read_run_info(path: Path) -> RunInfo:
    """Return a run.json; errors as in `RunFolder.read_info`."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path.parent} holds no run: run.json is missing") from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read or is not JSON: {error}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(version, int):
        raise RunFolderError(f"{path} has no format_version, so it is no run of cpbench")
    if version > RUN_FORMAT_VERSION:
        raise RunFolderError(f"{path} has format version {version}; update cpbench to read it")
    try:
        # From JSON, so that the strict scenario takes lists for its tuples.
        return RunInfo.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunFolderError(f"{path} does not follow the schema: {where}: {first['msg']}") from error


def checked_name(name: str) -> str:
    """Return a run's name if it can be the name of a folder.

    Raises:
        UsageError: it has a path separator, starts with a dot or is empty.
    """
    if not _NAME.match(name):
        raise UsageError(
            f"run name {name!r} is not allowed: use up to 100 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit; --runs gives the folder around it"
        )
    return name


def default_name(scenario: str, runs: Path) -> str:
    """Return a name that no run in `runs` has: the time in UTC, then the scenario."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", scenario)[:60]
    stem = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{safe}"
    names = [stem, *(f"{stem}-{k}" for k in range(2, 1000))]
    return next(name for name in names if not (runs / name).exists())


def now() -> str:
    """Return the time in UTC, ISO 8601 with seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _to_parquet(frame: Any, path: Path) -> None:  # noqa: ANN401 - pandas is imported where it is used
    frame.to_parquet(path, index=False)


def _to_csv(frame: Any, path: Path) -> None:  # noqa: ANN401
    frame.to_csv(path, index=False)


__all__ = [
    "RUN_FORMAT_VERSION",
    "SBATCH_FILE",
    "RunFolder",
    "RunInfo",
    "Session",
    "checked_name",
    "default_name",
    "now",
    "read_run_info",
]
