"""Which of the planned configurations to run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cpbench.context_plan import MethodPlan, Point, Recommendation


def recommended(plans: Sequence[MethodPlan], *, asked: bool) -> Recommendation | None:
    """Return the fastest configuration at the length asked for, or the one with the longest context.

    Without a modelled time the leanest counts as the fastest.
    """
    if asked:
        fitting = [
            (plan, plan.asked, plan.asked_configuration)
            for plan in plans
            if plan.asked is not None and plan.asked.status == "ok"
        ]
        best = min(fitting, key=lambda item: _speed_order(item[1]), default=None)
    else:
        reached = [(plan, plan.longest, plan.configuration) for plan in plans if plan.longest is not None]
        best = min(reached, key=lambda item: (-item[1].seq_len, *_speed_order(item[1])), default=None)
        fitting = []
    if best is None:
        return None
    plan, point, configuration = best
    return Recommendation(
        configuration=configuration or plan.configuration,
        world_size=plan.world_size,
        nodes=plan.nodes,
        point=point,
        alike=tuple(
            dict.fromkeys(
                other.method
                for other, its, _ in fitting
                if other is not plan and other.world_size == plan.world_size and _alike(point, its)
            )
        ),
    )


def _speed_order(point: Point) -> tuple[float, int]:
    rate = point.tokens_per_second_per_gpu
    return (-rate if rate is not None else math.inf, point.device_needed_bytes)


def _alike(best: Point, other: Point) -> bool:
    if best.step_seconds is None or other.step_seconds is None or best.uncertainty is None:
        return False
    return other.step_seconds <= best.step_seconds * (1 + best.uncertainty)
