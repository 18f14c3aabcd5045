"""One operation timed on a GPU, beside what the time model says of it (`cpbench.timing.probe_rates`)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, TypeAdapter

from cpbench.units import format_bytes, format_seconds


class RateProbe(BaseModel):
    """One operation, measured, and what the time model says of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: str
    """In words."""
    seconds: float
    """Median of several runs after a warm-up."""
    modelled_seconds: float | None = None
    """By the profile's rates; None where the time model has no such operation."""
    flops: int = 0
    bytes: int = 0
    """Moved; of page-locking, locked."""
    inner_bytes: int | None = None
    """Most that the allocator gave beside the results, during the operation."""
    stated_inner_bytes: int | None = None
    """What estimates count for it."""

    @property
    def rate(self) -> str:
        """FLOP/s or bytes/s in words."""
        if self.flops:
            return f"{self.flops / self.seconds / 1e12:.0f} TFLOP/s"
        return f"{self.bytes / self.seconds / 1e9:.1f} GB/s" if self.bytes else ""

    @property
    def line(self) -> str:
        """Everything in one line."""
        modelled = inside = ""
        if self.modelled_seconds is not None:
            modelled = f"model / measured {self.modelled_seconds / self.seconds:.2f}"
        if self.inner_bytes is not None and self.stated_inner_bytes is not None:
            inside = (
                f"inside {format_bytes(self.inner_bytes)}, stated {format_bytes(self.stated_inner_bytes)}"
            )
        cells = (self.name, self.shape, format_seconds(self.seconds), self.rate, modelled, inside)
        return "  ".join(cell for cell in cells if cell)


RateProbes = TypeAdapter(list[RateProbe])
"""What the file of a run of probes holds."""
