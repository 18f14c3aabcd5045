"""Two planted faults: the closed form has one hop too many for K and V in forward, where they need not come home, and
leaves out the last hop of dK and dV in backward, which must.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpbench.case import Case
from cpbench.method import Costs
from methods.ring import Ring


@dataclass(frozen=True, kw_only=True)
class BrokenCosts(Ring):
    """Ring attention that claims to send more in forward and less in backward than it does."""

    def costs(self, case: Case) -> Costs:
        """See `cpbench.method.Method.costs`."""
        costs, ranks = Ring.costs(self, case), case.world_size
        forward, backward = (
            costs.forward_collective_bytes["send"],
            costs.backward_collective_bytes["send"],
        )
        return replace(
            costs,
            forward_collective_bytes={"send": forward * ranks // (ranks - 1)},
            backward_collective_bytes={"send": forward + (backward - forward) * (ranks - 1) // ranks},
        )


METHOD = BrokenCosts
