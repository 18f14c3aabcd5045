"""Streams as queues, held against schedules worked out by hand."""

from __future__ import annotations

import pytest

from cpbench.timing.operation import Operation, Stream, Work
from cpbench.timing.schedule import Schedule, schedule

STREAM_OF: dict[Work, Stream] = {"collective": "communication", "copy": "copy_out"}


def op(
    work: Work, seconds: float, *waits: Operation, phase: str = "forward", stream: Stream | None = None
) -> Operation:
    """An operation whose duration is its size."""
    return Operation(
        work, work, stream or STREAM_OF.get(work, "compute"), (phase,), size=int(seconds), waits=waits
    )


def run(*operations: Operation) -> Schedule:
    return schedule(operations, lambda operation: float(operation.size))


def test_compute_runs_one_after_another() -> None:
    """Three operations take the sum of their durations; the critical path is all of them."""
    plan = run(op("matmul", 3), op("memory", 2), op("matmul", 5, phase="backward"))

    assert plan.step_seconds == 10
    assert plan.starts == [0, 3, 5]
    assert plan.phase_seconds == {"forward": 5, "backward": 5, "optimizer": 0}
    assert plan.critical_path_seconds == {"forward/matmul": 3, "forward/memory": 2, "backward/matmul": 5}
    assert plan.exposed_communication_seconds == 0


def test_a_collective_beside_compute_is_exposed_by_what_compute_does_not_cover() -> None:
    """A collective of 7 s from second 3 on, with 4 s of compute beside it, makes compute wait for 3 s."""
    first = op("matmul", 3)
    exchange = op("collective", 7, first)
    plan = run(first, exchange, op("matmul", 4), op("memory", 1, exchange))

    assert plan.starts == [0, 3, 3, 10]
    assert plan.step_seconds == 11
    assert plan.exposed_communication_seconds == 3
    assert plan.busy_seconds == {"compute": 8, "communication": 7}
    assert plan.critical_path_seconds == {"forward/matmul": 3, "forward/collective": 7, "forward/memory": 1}


def test_a_covered_collective_costs_nothing() -> None:
    """The same collective with 9 s of compute beside it is not on the critical path."""
    first = op("matmul", 3)
    exchange = op("collective", 7, first)
    plan = run(first, exchange, op("matmul", 9), op("memory", 1, exchange))

    assert plan.step_seconds == 13
    assert plan.exposed_communication_seconds == 0
    assert plan.critical_path_seconds == {"forward/matmul": 12, "forward/memory": 1}


def test_collectives_of_one_stream_queue() -> None:
    """Two exchanges started together run one after the other; on streams of their own they run beside one another."""
    first = op("matmul", 1)
    a, b = op("collective", 4, first), op("collective", 4, first)
    assert run(first, a, b, op("memory", 1, a, b)).step_seconds == 10

    other = op("collective", 4, first, stream="gather")
    assert run(first, a, other, op("memory", 1, a, other)).step_seconds == 6


def test_copies_are_told_apart_from_collectives() -> None:
    """Compute that waits for a copy counts as exposed copy; what ends after all compute is exposed too."""
    first = op("matmul", 2)
    out = op("copy", 5, first)
    back = op("copy", 5, out, stream="copy_in")
    plan = run(first, out, back, op("matmul", 1, back), op("copy", 3))

    assert plan.starts == [0, 2, 7, 12, 7]
    assert plan.step_seconds == 13
    assert plan.exposed_copy_seconds == 10
    assert plan.exposed_communication_seconds == 0

    tail = run(first, op("collective", 6, first, phase="optimizer"))
    assert tail.step_seconds == 8
    assert tail.exposed_communication_seconds == 6
    assert tail.phase_seconds == {"forward": 2, "backward": 0, "optimizer": 6}


def test_the_critical_path_adds_up_to_the_step() -> None:
    """Whatever the durations, the chain has no gap."""
    made: list[Operation] = []
    for index in range(60):
        work: Work = ("matmul", "collective", "memory", "copy")[index * 7 % 4]
        waits = [made[-1 - index % 3]] if index > 3 else []
        made.append(op(work, 1 + index * 5 % 11, *waits, phase=("forward", "backward")[index // 30]))
    plan = run(*made)

    assert sum(plan.critical_path_seconds.values()) == pytest.approx(plan.step_seconds)
    assert sum(plan.phase_seconds.values()) == pytest.approx(plan.step_seconds)
    busy = plan.busy_seconds["compute"]
    assert busy + plan.exposed_communication_seconds + plan.exposed_copy_seconds == pytest.approx(
        plan.step_seconds
    )


def test_nothing_takes_no_time() -> None:
    """An empty step has no duration and no path."""
    assert run().step_seconds == 0
    assert run().critical_path_seconds == {}
