"""One point of a sweep: everything that decides what a training step computes and how it is measured.

A case is *requested* by a scenario or the command line and *resolved* in the measured half (`cpbench.resolve`),
where the method fills in its option defaults and its two parallel degrees.  The id of a case is a hash of the
resolved case, so a run resumes by skipping the ids it has records for.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from cpbench.errors import UnknownName
from cpbench.model_config import ModelConfig
from cpbench.units import format_length

Mode = Literal["measure", "emulate", "estimate"]
Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
AttentionBackend = Literal["auto", "cpu-flash", "cuda-flash", "cudnn"]
OptionValue = bool | int | float | str
TRACED_STEPS = 2
"""Steps of a measured case under the memory trace; they count as warm-up.  An emulated case leaves the first out."""


class Stack(BaseModel):
    """What surrounds attention, with one meaning for every method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: Literal["none", "full"] = "full"
    """full: a block keeps only its input and is recomputed in backward."""
    offload: Literal["none", "inputs"] = "none"
    """inputs: checkpointed block inputs wait in pinned host memory."""
    tile_mlp: bool = False
    """The MLP runs in token tiles, forward and backward."""
    tile_norm: bool = False
    """RMSNorm runs in token tiles, so no full-size fp32 copy exists."""
    tile_loss: bool = False
    """Head and cross-entropy run in row tiles; logits never exist in full."""
    optimizer_offload: bool = False
    """fp32 masters' AdamW states live in host memory and are streamed through the device."""
    save_attention: NonNegativeInt | Literal["auto"] = 0
    """Blocks that keep their attention output in host memory and do not recompute it; `auto`: as many as the host
    budget allows.  Needs full checkpointing; method `offload` keeps all of its own accord."""
    host_budget_bytes: PositiveInt | None = None
    """Host memory of a node that `save_attention = auto` may fill; spent on resolution, then None."""


STACKS: dict[str, Stack] = {
    "plain": Stack(checkpoint="none"),
    "checkpoint": Stack(checkpoint="full"),
    "long": Stack(checkpoint="full", offload="inputs", tile_mlp=True, tile_norm=True, tile_loss=True),
}
"""Stack presets; `long` is the published setting and the default."""


def stack_by_name(name: str) -> Stack:
    """Return a stack preset.

    Raises:
        UnknownName: no preset has this name.
    """
    if name not in STACKS:
        raise UnknownName("stack", name, STACKS)
    return STACKS[name]


_LATER = ("model_layers", "rank", "host_memory_bytes")


class Case(BaseModel):
    """One training configuration to run; see `Record` for what comes of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(min_length=1)
    """Name of the context-parallel method, as in `cpbench list methods`."""
    options: dict[str, OptionValue] = Field(default_factory=dict)
    """The method's options; complete once the case is resolved."""
    model: str = Field(min_length=1)
    """Name of the model preset, or of the folder of its config.json."""
    architecture: ModelConfig
    """The model's shape, with the number of layers that run."""
    model_layers: PositiveInt | None = None
    """Layers that the model has, where fewer run; None: all run."""
    seq_len: PositiveInt
    """Global sequence length S in tokens."""
    batch_size: PositiveInt = 1
    """Sequences per step."""
    world_size: PositiveInt
    """Ranks W over which the sequence and the parameters are sharded."""
    nodes: PositiveInt = 1
    """Machines the ranks are spread over; W must be a multiple of it."""
    ulysses_degree: PositiveInt | None = None
    """Ranks that exchange heads by all-to-all, C; filled in on resolution."""
    ring_degree: PositiveInt | None = None
    """Ranks that pass key/value blocks around, R; W = C x R; filled in on resolution."""
    dtype: Dtype = "bfloat16"
    """Compute dtype of parameters and activations; masters and optimizer states are fp32."""
    stack: Stack = STACKS["long"]
    """Checkpointing, offload and tiling."""
    attention_backend: AttentionBackend = "auto"
    """The kernel asked for; the record names the one really used."""
    mode: Mode = "measure"
    """measure: real ranks; emulate: one rank of W on one device; estimate: fake tensors."""
    device: Device = "cpu"
    """Where the tensors live; of an estimate, what it stands for (its own fake tensors live nowhere)."""
    rank: NonNegativeInt | None = None
    """The one rank that runs, of an emulated or estimated case; None in an estimate: rank 0."""
    hardware: str | None = None
    """Machine profile of an estimate for GPUs, or of an emulation's communication; None when measured, or for CPU
    processes."""
    host_memory_bytes: PositiveInt | None = None
    """Host memory of a node for which an estimate judges whether it fits; None: what the machine profile says."""
    steps: PositiveInt = 3
    """Timed steps."""
    warmup: NonNegativeInt = 2
    """Steps before the timed ones; never in a time aggregate."""
    seed: NonNegativeInt = 0
    """Seed of the weights and of the tokens."""

    @property
    def case_id(self) -> str:
        """A hash of the case: method and length for people, then 12 hex digits of SHA-256 of its JSON."""
        fields = self.model_dump(mode="json")
        for name in _LATER:  # cases from before these fields keep their ids
            if fields[name] is None:
                del fields[name]
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in self.method)[:40]
        return f"{safe}-{format_length(self.seq_len).replace('.', '_')}-{digest}"

    @property
    def title(self) -> str:
        """A line for people, for example `upipe  tiny  128K  x4`."""
        return f"{self.method}  {self.model}  {format_length(self.seq_len)}  x{self.world_size}"

    @property
    def element_bytes(self) -> int:
        """Bytes of one element in the compute dtype."""
        return 4 if self.dtype == "float32" else 2

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of one sequence that a rank holds, n = S / W (whole once the method's check has passed)."""
        return self.seq_len // self.world_size
