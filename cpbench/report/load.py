"""Reads run folders into entries: a record and the run it came from.

A record that is too new, truncated, not JSON or implausible is named and skipped.  `run.json` is read
tolerantly: it adds the command and the dates, and a report is complete without it.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpbench.errors import RecordError, RunFolderError
from cpbench.record import Record, read_record

_LARGEST_INTEGER = 2**62
"""Above this no count of bytes or tokens is real, and columns of 64-bit integers could not hold it."""
_MOST_FLOPS = 1e30
"""FLOPs are a float; a step over 8M tokens has 1e19 of them on each rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One record of a report."""

    run: str
    """Name of the run, unique within the report."""
    record: Record


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What a run folder says of itself; every text may be missing."""

    name: str
    records: int
    planned: int | None = None
    """Cases that the run was to have."""
    command: str | None = None
    scenario: str | None = None
    description: str | None = None
    started: str | None = None
    ended: str | None = None
    git_commit: str | None = None
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """All that a report is made of."""

    entries: tuple[Entry, ...]
    runs: tuple[RunFacts, ...]
    skipped: tuple[str, ...]


def load_runs(run_dirs: Sequence[Path]) -> Loaded:
    """Read every record of every run; a folder given twice is read once.

    Raises:
        RunFolderError: no folder is given, one does not exist, or none of its records can be read.
    """
    folders = list({folder.resolve(): folder for folder in run_dirs})
    if not folders:
        raise RunFolderError("no run is given to report; name at least one run folder")
    entries: list[Entry] = []
    runs: list[RunFacts] = []
    skipped: list[str] = []
    for name, folder in zip(_run_names(folders), folders, strict=True):
        records, problems = _read_folder(folder)
        if not records:
            raise RunFolderError(_nothing_to_read(folder, problems))
        entries += [Entry(run=name, record=record) for record in records]
        skipped += [f"{name}: {problem}" for problem in problems]
        runs.append(_run_facts(folder, name, len(records)))
    return Loaded(entries=tuple(entries), runs=tuple(runs), skipped=tuple(skipped))


def _run_names(folders: Sequence[Path]) -> list[str]:
    """Folder names, with the parent's name or a number where that is needed to tell them apart."""
    names = [folder.name or str(folder) for folder in folders]
    if len(set(names)) < len(names):
        twice = {name for name, count in Counter(names).items() if count > 1}
        names = [f"{f.parent.name}/{n}" if n in twice else n for f, n in zip(folders, names, strict=True)]
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        names[index] = name if seen[name] == 1 else f"{name} #{seen[name]}"
    return names


def _read_folder(folder: Path) -> tuple[list[Record], list[str]]:
    """The readable records of a run, in the order of their file names, and why the others are not."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise RunFolderError(f"run {folder} {what}; give the folder of a run, for example runs/<name>")
    records: list[Record] = []
    problems: list[str] = []
    for path in _record_files(folder):
        try:
            record = read_record(path)
        except RecordError as error:
            problems.append(str(error).replace(str(path), path.name))
            continue
        except RecursionError:
            problems.append(f"record {path.name} is nested too deeply to be a record")
            continue
        doubt = _implausible(record)
        if doubt:
            problems.append(f"record {path.name} {doubt}, so it is no measured case")
        else:
            records.append(record)
    return records, problems


def _record_files(folder: Path) -> list[Path]:
    cases = folder / "cases"
    source = cases if cases.is_dir() else folder
    try:
        files = sorted(path for path in source.glob("*.json") if not path.name.startswith("."))
    except OSError as error:
        raise RunFolderError(
            f"run {folder} cannot be read: {error.strerror}; check its permissions"
        ) from error
    return [path for path in files if source is cases or path.name not in ("run.json", "machine.json")]


def _nothing_to_read(folder: Path, problems: Sequence[str]) -> str:
    if not problems:
        where = folder / "cases"
        return f"run {folder} holds no record; expected {where}/*.json. Has its sweep finished a case?"
    shown = "\n  ".join(problems[:5]) + ("\n  ..." if len(problems) > 5 else "")
    return f"run {folder} holds no record that can be read ({len(problems)} skipped):\n  {shown}"


def _implausible(record: Record) -> str | None:
    """A schema cannot rule these out for files made elsewhere, yet no axis or column could show them."""
    for name in ("seq_len", "world_size", "batch_size"):
        if getattr(record, name) < 1:
            return f"has {name}={getattr(record, name)}"
    for name, value in _numbers(record.model_dump(exclude={"ranks"}), ""):
        if abs(value) > (_MOST_FLOPS if name.endswith("_flops") else _LARGEST_INTEGER):
            return f"has {name}={value:.3g}"
        if value < 0 and name.endswith(("_bytes", "_seconds", "_second", "_gpu")):
            return f"has {name}={value:.3g}"
    return None


def _numbers(value: object, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, str(key) if not name.endswith("_bytes") else name)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _run_facts(folder: Path, name: str, records: int) -> RunFacts:
    raw = _read_run_json(folder / "run.json")
    scenario = raw.get("scenario")
    command = raw.get("command")
    if isinstance(command, list):
        command = shlex.join(str(part) for part in command)
    versions = raw.get("versions")
    return RunFacts(
        name=name,
        records=records,
        command=_text(command),
        scenario=_text(scenario.get("name") if isinstance(scenario, dict) else scenario),
        description=_text(scenario.get("description")) if isinstance(scenario, dict) else None,
        planned=len(raw["case_ids"]) if isinstance(raw.get("case_ids"), list) else None,
        started=_text(raw.get("start")),
        ended=_text(raw.get("end")),
        git_commit=_text(raw.get("git_commit")),
        versions=tuple(
            (_clean(str(key)), _clean(str(value)))
            for key, value in (versions.items() if isinstance(versions, dict) else ())
            if isinstance(value, str | int | float)
        ),
    )


def _read_run_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _text(value: object) -> str | None:
    return _clean(value) if isinstance(value, str) and value else None


def _clean(text: str) -> str:
    """JSON can spell lone surrogates, which no file in UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
