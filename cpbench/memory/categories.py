"""From a timeline to the numbers of a record: peak, split by category and phase, attention intermediates.

Categories (they add up to the live bytes at every moment):

    sharded_parameters      this rank's fp32 shards
    gradients               sharded gradients, and unsharded gradients until they are reduced
    optimizer               AdamW states
    unsharded_parameters    gathered weights of the blocks in use
    communication_buffers   staging of all-gather, reduce-scatter and all-to-all
    residual                the residual stream and checkpointed inputs
    attention               what an attention block holds beyond its input and output
    mlp, norm, loss         temporaries of these
    kernel_scratch          what an attention kernel allocates and frees inside
    workspace               what the library of matrix products keeps for itself, on CUDA
    other                   everything else

Host memory (the offload pool) lives in the same allocator on CPU; it is marked and left out.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from cpbench.memory.timeline import Allocation, Event, Timeline
from cpbench.record import LiveTensor

_BY_LABEL = {
    "sharded_parameters": "sharded_parameters",
    "gradients": "gradients",
    "weight_gradient": "gradients",
    "optimizer": "optimizer",
    "residual": "residual",
    "attention_output": "residual",
    "attention_input_gradient": "residual",
    "workspace": "workspace",
}
_PHASES = ("forward", "backward", "optimizer")
_LARGEST = 24


@dataclass(slots=True)
class MemoryNumbers:
    """What one traced step used; bytes."""

    peak_bytes: int = 0
    by_category: dict[str, int] = field(default_factory=dict)
    by_phase: dict[str, int] = field(default_factory=dict)
    largest: tuple[LiveTensor, ...] = ()
    attention_peak: int = 0
    attention_forward_peak: int = 0
    attention_backward_peak: int = 0
    attention_stage_peak: int = 0


def category(allocation: Allocation) -> str | None:
    """Return the category of an allocation, or None for host memory."""
    if allocation.label == "host":
        return None
    if allocation.label in _BY_LABEL:
        return _BY_LABEL[allocation.label]
    if allocation.inside_kernel:
        return "kernel_scratch"
    if "FSDP::" in allocation.site or "fsdp::" in allocation.site:
        return _fsdp_category(allocation.site)
    names = [part.split(":")[0] for part in reversed(allocation.scope)]
    for name in names:
        if name == "communication":
            return "communication_buffers"
        if name == "offload":
            return "residual"
        if name in ("attention", "mlp", "norm", "loss", "optimizer"):
            return name
    return "other"


def analyse(timeline: Timeline, *, step: str) -> MemoryNumbers:
    """Return the numbers of one step.

    Args:
        timeline: everything since before the parameters were made.
        step: name of the scope around the step to report, for example `step:1`.
    """
    numbers = MemoryNumbers()
    live: dict[int, Allocation] = {}
    total = 0
    attention = _AttentionMeter()
    at_peak: list[Allocation] = []
    for event in timeline.events:
        a = event.allocation
        if a.label == "host":
            continue
        if event.is_free:
            live.pop(id(a), None)
            total -= a.bytes
            attention.free(a)
            continue
        live[id(a)] = a
        total += a.bytes
        attention.allocate(a, event, step)
        if step not in event.scope:
            continue
        phase = next((name for name in event.scope if name in _PHASES), "other")
        numbers.by_phase[phase] = max(total, numbers.by_phase.get(phase, 0))
        if total > numbers.peak_bytes:
            numbers.peak_bytes = total
            at_peak = list(live.values())
    numbers.attention_forward_peak = attention.peaks["forward"]
    numbers.attention_backward_peak = attention.peaks["backward"]
    numbers.attention_peak = max(attention.peaks.values())
    numbers.attention_stage_peak = attention.stage_peak
    _describe(numbers, at_peak)
    return numbers


class _AttentionMeter:
    """Live bytes that one block's attention made and that are neither its output nor a gradient it returns.

    `stage_peak` leaves out two things more: what a mark says is an attention output, or its gradient, that a method
    holds at full width around its stages (`attention_full_width`), and what the kernel allocates inside.  That is how
    the UPipe paper counts when it says that intermediates shrink to U/H.
    """

    def __init__(self) -> None:
        self._live: dict[str, int] = defaultdict(int)
        self._stage: dict[str, int] = defaultdict(int)
        self._counted: dict[int, str] = {}
        self.peaks = {"forward": 0, "backward": 0}
        self.stage_peak = 0

    def allocate(self, a: Allocation, event: Event, step: str) -> None:
        block = next((name for name in event.scope if name.startswith("attention:")), None)
        if block is None or step not in event.scope or a.label in _BY_LABEL:
            return
        self._counted[id(a)] = block
        self._live[block] += a.bytes
        phase = "forward" if "forward" in event.scope else "backward"
        self.peaks[phase] = max(self.peaks[phase], self._live[block])
        if _of_a_stage(a):
            self._stage[block] += a.bytes
            self.stage_peak = max(self.stage_peak, self._stage[block])

    def free(self, a: Allocation) -> None:
        block = self._counted.pop(id(a), None)
        if block is not None:
            self._live[block] -= a.bytes
            if _of_a_stage(a):
                self._stage[block] -= a.bytes


def _of_a_stage(a: Allocation) -> bool:
    return a.label != "attention_full_width" and not a.inside_kernel


def _fsdp_category(site: str) -> str:
    if "post_backward" in site or "chunk_cat" in site or "reduce" in site:
        return "communication_buffers"
    return "unsharded_parameters"


def _describe(numbers: MemoryNumbers, at_peak: list[Allocation]) -> None:
    for allocation in at_peak:
        name = category(allocation) or "other"
        numbers.by_category[name] = numbers.by_category.get(name, 0) + allocation.bytes
    largest = sorted(at_peak, key=lambda a: a.bytes, reverse=True)[:_LARGEST]
    numbers.largest = tuple(
        LiveTensor(
            bytes=a.bytes,
            category=category(a) or "other",
            phase="/".join(a.scope) or "before",
            site=a.site or "python",
        )
        for a in largest
    )
