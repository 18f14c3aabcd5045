"""The function that PyTorch's context_parallel ends in, with our kernel, on real CPU ranks.

`torch-ring` itself refuses CPU.  What it runs for an estimate does run there, so its layout, its masks and its use of
PyTorch's function can be verified without a GPU; `context_parallel` around it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpbench.case import Case
from methods.torch_ring import TorchRing


@dataclass(frozen=True, kw_only=True)
class TorchRingOnCpu(TorchRing):
    """Without the refusal."""

    def check(self, case: Case) -> None:
        """Refuse what torch-ring refuses on CUDA."""
        TorchRing.check(self, case.model_copy(update={"device": "cuda"}))


METHOD = TorchRingOnCpu
VERIFY_OPTIONS = ({"rotate": "alltoall"},)
