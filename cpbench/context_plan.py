"""What `cpbench plan` asks and answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from cpbench.case import Dtype, OptionValue
from cpbench.model_config import ModelConfig

StackChange = bool | int | str


class Configuration(BaseModel):
    """A method with the options and stack changes that make the difference."""

    model_config = ConfigDict(frozen=True)

    method: str
    options: dict[str, OptionValue] = {}
    """Other than the defaults."""
    stack: dict[str, StackChange] = {}
    """Changes to the preset `long`."""

    @property
    def words(self) -> str:
        """The options and changes for people; empty for none."""
        return ", ".join(f"{k}={str(v).lower()}" for k, v in (self.options | self.stack).items())


class Point(BaseModel):
    """The estimate of a configuration at one length."""

    model_config = ConfigDict(frozen=True)

    seq_len: int
    status: Literal["ok", "oom_device", "oom_host"]
    reason: str | None = None
    """What is short, and by how much."""
    peak_bytes: int
    """Tensors of a rank at their peak."""
    device_needed_bytes: int
    """With margin, context and communicators."""
    host_needed_bytes: int
    """Of a node, with margin and the ranks' processes."""
    step_seconds: float | None = None
    tokens_per_second_per_gpu: float | None = None
    mfu: float | None = None
    uncertainty: float | None = None
    """Part by which the modelled time may be off."""


End = Literal[
    "device memory", "host memory", "limit of the search", "divisibility", "cannot run", "estimate failed"
]
"""divisibility: the method refuses the numbers, as where ranks do not divide heads, not the need for memory."""


class MethodPlan(BaseModel):
    """What a method reaches on a number of ranks."""

    model_config = ConfigDict(frozen=True)

    method: str
    world_size: int
    nodes: int
    configuration: Configuration
    """The one with the longest context."""
    longest: Point | None = None
    """The longest context that fits, to `step_tokens`."""
    too_long: Point | None = None
    """One step further: what ends it."""
    ended_by: End
    reason: str | None = None
    """Why it cannot run, or what is short one step further."""
    points: tuple[Point, ...] = ()
    """Every length estimated for `configuration`, in order."""
    asked: Point | None = None
    """At the length asked for: the fastest configuration that fits, or the one that misses by least."""
    asked_configuration: Configuration | None = None
    asked_reason: str | None = None
    """Why there is no estimate of the length asked for."""


class Question(BaseModel):
    """What was asked."""

    model_config = ConfigDict(frozen=True)

    methods: tuple[str, ...]
    model: str
    architecture: ModelConfig
    worlds: tuple[int, ...]
    hardware: str
    """A profile's name or path."""
    host_memory_bytes: int
    """Of a node."""
    seq_len: int | None = None
    batch_size: int = 1
    dtype: Dtype = "bfloat16"


class Recommendation(BaseModel):
    """The configuration to run."""

    model_config = ConfigDict(frozen=True)

    configuration: Configuration
    world_size: int
    nodes: int
    point: Point
    alike: tuple[str, ...] = ()
    """Methods whose modelled step is no further away than the model's uncertainty."""


class ContextPlan(BaseModel):
    """The answer."""

    model_config = ConfigDict(frozen=True)

    question: Question
    step_tokens: dict[int, int]
    """By number of ranks: the step to which lengths were searched."""
    device_memory_bytes: int
    """What programs can have of a device."""
    methods: tuple[MethodPlan, ...]
    """In the order asked for, by number of ranks."""
    recommended: Recommendation | None = None
    """For the length asked for, or the longest context of all; None if nothing fits."""
