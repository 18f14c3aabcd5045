"""How one attention kernel did at one shape (`cpbench.parity.kernel_checks`)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, TypeAdapter


class KernelFinding(BaseModel):
    """One kernel at one shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel: str
    shape: str
    """In words."""
    passed: bool
    worst: str
    """The quantity nearest to its limit, or what went wrong."""


KernelFindings = TypeAdapter(list[KernelFinding])
"""What the file of a run holds."""
