"""A planted fault: the closed form leaves out that dK and dV take one hop more than K and V, to come home."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpbench.case import Case
from cpbench.method import Costs
from methods.ring import Ring


@dataclass(frozen=True, kw_only=True)
class BrokenCosts(Ring):
    """Ring attention that claims to send less than it does."""

    def costs(self, case: Case) -> Costs:
        """See `cpbench.method.Method.costs`."""
        costs, ranks = Ring.costs(self, case), case.world_size
        forward, backward = (
            costs.forward_collective_bytes["send"],
            costs.backward_collective_bytes["send"],
        )
        return replace(
            costs,
            backward_collective_bytes={"send": forward + (backward - forward) * (ranks - 1) // ranks},
        )


METHOD = BrokenCosts
