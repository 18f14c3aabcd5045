"""The tree of errors that mean "the user can mend this".

CpbenchError                  no traceback, exit code 2
+-- UsageError                a flag or argument is wrong
|   +-- UnknownName           a method, model, scenario, machine or key that does not exist
+-- ScenarioError             a scenario file is malformed
+-- RunFolderError            a run folder cannot be written, is locked, or holds another run
+-- RecordError               a record file cannot be read
|   +-- RecordTooNew          it was written by a newer cpbench
+-- Unsupported               a method cannot run a case; becomes status `unsupported` in a sweep
+-- Uncountable               a step did what the count cannot see; becomes status `invalid` in a sweep
+-- MethodUnavailable         a method's file cannot be loaded (missing package, broken plug-in)

Every other exception is a defect of cpbench: it keeps its traceback and exits with 1.  Only `cli.py` prints
and exits.  A message says what was wrong with the value, what is allowed, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class CpbenchError(Exception):
    """The user's problem: shown without a traceback, exit code 2."""


class UsageError(CpbenchError):
    """A flag or argument has a wrong value."""


class UnknownName(UsageError):
    """A name that is not in its collection; the message offers the nearest one.

    Args:
        kind: what the name should be, for example "method".
        name: what was given.
        known: every valid name.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = nearest(name, names)
        hint = f"; did you mean {near!r}?" if near else "."
        super().__init__(f"unknown {kind} {name!r}{hint} Known: {', '.join(names) or '(none)'}")


class ScenarioError(CpbenchError):
    """A scenario file is not valid TOML, has unknown keys or wrong values."""


class RunFolderError(CpbenchError):
    """A run folder cannot be created, written or locked."""


class RecordError(CpbenchError):
    """A record file is truncated, is not JSON, or does not follow the schema."""


class RecordTooNew(RecordError):
    """A record was written by a newer cpbench than this one."""


class Unsupported(CpbenchError):
    """A method cannot run a case; in a sweep this is a result, not a failure."""


class Uncountable(CpbenchError):
    """An operator or collective whose memory or bytes the count does not know; the message names it."""


class MethodUnavailable(CpbenchError):
    """A method exists but cannot be loaded, for example because an optional package is missing."""


def without_name(reason: str, method: str) -> str:
    """Return a method's reason without the name that it begins with, where the name stands before it already."""
    return reason.removeprefix(f"{method}: ")


_OTHER_NAMES = {"gpu": "cuda", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
"""What people say for some values."""


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known name closest to `name`, best one that begins with it, or None when none is close."""
    known = list(known)
    if _OTHER_NAMES.get(name.lower()) in known:
        return _OTHER_NAMES[name.lower()]
    starts = [known_name for known_name in known if name and known_name.lower().startswith(name.lower())]
    if starts:
        return min(starts, key=len)
    matches = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.5)
    if not matches:
        return None
    return next(k for k in known if k.lower() == matches[0])
