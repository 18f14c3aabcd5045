"""When each operation of a step runs, given how long each takes: streams are queues, and some wait for others.

Every stream works through its operations in order.  An operation starts when the one before it on its stream, and all
that it waits for, have ended.  So nothing here knows of rates, or that streams share links and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cpbench.timing.operation import Operation, Stream

PHASES = ("forward", "backward", "optimizer")


@dataclass(slots=True)
class Schedule:
    """A step in time; seconds."""

    step_seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Until the last computation of each phase has ended; with the rest after it they add up to the step."""
    busy_seconds: dict[Stream, float] = field(default_factory=dict)
    """Time in which each stream works."""
    exposed_communication_seconds: float = 0.0
    """Time in which compute waits for a collective."""
    exposed_copy_seconds: float = 0.0
    """Time in which compute waits for a copy to or from host memory."""
    critical_path_seconds: dict[str, float] = field(default_factory=dict)
    """The chain of operations that makes the step as long as it is, by `phase/kind of work`; adds up to the step."""
    starts: list[float] = field(default_factory=list)
    """Of the operations, in their order."""


def schedule(operations: Sequence[Operation], duration: Callable[[Operation], float]) -> Schedule:
    """Return when operations run.

    Args:
        operations: in program order; one waits only for earlier ones.
        duration: seconds of one, its repetitions included.
    """
    result = Schedule()
    free: dict[Stream, float] = {}
    last: dict[Stream, Operation] = {}
    ends: dict[int, float] = {}
    before: dict[int, Operation | None] = {}
    lengths: dict[int, float] = {}
    for operation in operations:
        stream = operation.stream
        start, cause = free.get(stream, 0.0), last.get(stream)
        queued = start
        for other in operation.waits:
            if ends[id(other)] > start:
                start, cause = ends[id(other)], other
        length = duration(operation)
        key = id(operation)
        ends[key], before[key], lengths[key] = start + length, cause, length
        if stream == "compute" and cause is not None and start > queued:
            _expose(result, cause, start - queued)
        result.starts.append(start)
        free[stream], last[stream] = start + length, operation
        result.busy_seconds[stream] = result.busy_seconds.get(stream, 0.0) + length
    _finish(result, last, ends)
    _phases(result, operations, ends)
    node = max(last.values(), key=lambda operation: ends[id(operation)], default=None)
    while node is not None:
        name = f"{node.phase}/{node.work}"
        result.critical_path_seconds[name] = result.critical_path_seconds.get(name, 0.0) + lengths[id(node)]
        node = before[id(node)]
    return result


def _expose(result: Schedule, cause: Operation, gap: float) -> None:
    if cause.work == "collective":
        result.exposed_communication_seconds += gap
    elif cause.work == "copy":
        result.exposed_copy_seconds += gap


def _finish(result: Schedule, last: dict[Stream, Operation], ends: dict[int, float]) -> None:
    """The step ends with the last operation of any stream; what runs after all compute is exposed."""
    final = max(last.values(), key=lambda operation: ends[id(operation)], default=None)
    if final is None:
        return
    result.step_seconds = ends[id(final)]
    computed = ends[id(last["compute"])] if "compute" in last else 0.0
    if result.step_seconds > computed:
        _expose(result, final, result.step_seconds - computed)


def _phases(result: Schedule, operations: Sequence[Operation], ends: dict[int, float]) -> None:
    until = 0.0
    for phase in PHASES:
        last = max(
            (ends[id(o)] for o in operations if o.stream == "compute" and o.phase == phase), default=until
        )
        if phase == PHASES[-1]:
            last = max(last, result.step_seconds)
        result.phase_seconds[phase] = max(last - until, 0.0)
        until = max(last, until)
