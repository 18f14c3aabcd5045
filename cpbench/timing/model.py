"""The time model: an estimate's operations at a machine profile's rates, scheduled on their streams.

It leaves out what only a run can show: contention of streams for memory, links and multiprocessors, the time that the
CPU takes to start kernels, the allocator, data loading, clocks that drop under load, and ranks that wait for a slower
one (the rank that is estimated stands for all).
"""

from __future__ import annotations

from collections.abc import Sequence

from cpbench.hardware import Rates
from cpbench.record import ModelledTime, StepSample
from cpbench.timing.operation import Operation
from cpbench.timing.rates import seconds
from cpbench.timing.schedule import schedule


def modelled_time(
    operations: Sequence[Operation], rates: Rates, kernel: str
) -> tuple[StepSample, ModelledTime]:
    """Return a step's modelled durations, and how they arise.

    Args:
        operations: of one rank, in program order.
        rates: of the machine.
        kernel: the attention backend.

    Raises:
        Unsupported: the profile has no rates for the kernel.
    """
    plan = schedule(operations, lambda operation: seconds(operation, rates, kernel))
    sample = StepSample(
        step_seconds=plan.step_seconds,
        forward_seconds=plan.phase_seconds["forward"],
        backward_seconds=plan.phase_seconds["backward"],
        optimizer_seconds=plan.phase_seconds["optimizer"],
    )
    modelled = ModelledTime(
        uncertainty=rates.uncertainty,
        exposed_communication_seconds=plan.exposed_communication_seconds,
        exposed_copy_seconds=plan.exposed_copy_seconds,
        busy_seconds={str(stream): busy for stream, busy in plan.busy_seconds.items()},
        critical_path_seconds=plan.critical_path_seconds,
        computed_flops=sum(float(operation.flops) * operation.times for operation in operations),
    )
    return sample, modelled
