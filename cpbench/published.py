"""Published results: tables of papers as data files, to be printed beside ours.

A file holds what one paper says of one setting (model, ranks, hardware) in its own units, and where each value stands.
Files are read like anybody's: unknown keys, values without a source, and parts that do not add up are refused.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from cpbench.case import OptionValue
from cpbench.errors import UsageError, nearest
from cpbench.units import GIB, parse_length

FORMAT_VERSION = 1
_ROUNDING_GIB = 0.15
"""Three parts and their sum, each rounded to a tenth, may differ by so much."""


def _length(value: Any) -> Any:  # noqa: ANN401 - raw TOML before validation
    try:
        return parse_length(value) if isinstance(value, str) else value
    except UsageError as error:
        raise ValueError(str(error)) from error


Length = Annotated[PositiveInt, BeforeValidator(_length)]
PublishedStatus = Literal["ok", "oom_device", "oom_host"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Source(_Part):
    """Where values stand."""

    text: str = Field(min_length=1)
    """Paper, table or figure, in words."""
    url: str = Field(default="", pattern=r"^(https://\S+)?$")


class PublishedValue(_Part):
    """One case of a published table."""

    seq_len: Length
    """Global tokens."""
    status: PublishedStatus = "ok"
    tokens_per_second_per_gpu: PositiveFloat | None = None
    peak_gib: PositiveFloat | None = None
    """Peak memory of a GPU; what kind of memory it is of, the file's `memory` says."""
    parts_gib: dict[str, PositiveFloat] = Field(default_factory=dict)
    """What the peak consists of, in the source's words."""
    source: str | None = None
    """Of the throughput, where it is not the method's."""
    memory_source: str | None = None

    @property
    def peak_bytes(self) -> int | None:
        """The peak in bytes."""
        return None if self.peak_gib is None else round(self.peak_gib * GIB)

    @model_validator(mode="after")
    def _says_something(self) -> PublishedValue:
        numbers = (self.tokens_per_second_per_gpu, self.peak_gib)
        if (self.status == "ok") == (numbers == (None, None)):
            raise ValueError("a case that is ok needs a number, and one that is out of memory has none")
        if (self.peak_gib is None) != (self.memory_source is None):
            raise ValueError("peak_gib and memory_source belong together")
        if self.parts_gib and abs(sum(self.parts_gib.values()) - (self.peak_gib or 0.0)) > _ROUNDING_GIB:
            raise ValueError(
                f"parts_gib add up to {sum(self.parts_gib.values()):.4g}, not to {self.peak_gib}"
            )
        return self


class PublishedMethod(_Part):
    """The cases of one method."""

    method: str = Field(min_length=1)
    """Our name of it."""
    name: str = Field(min_length=1)
    """Its name in the source."""
    source: str
    """Key of the source of its throughput."""
    options: dict[str, OptionValue] = Field(default_factory=dict)
    """Our options that come closest to what was run."""
    kernel: str | None = None
    """Its attention kernel, where it is not that of the others; one of torch's own by our name of it."""
    values: tuple[PublishedValue, ...] = Field(min_length=1, strict=False)


class Published(_Part):
    """One published comparison: everything in one setting."""

    format_version: int
    title: str = Field(min_length=1)
    short: str = Field(min_length=1)
    """The title in a word or two."""
    arxiv: str = Field(pattern=r"^\d{4}\.\d{4,5}$")
    model: str = Field(min_length=1)
    """A preset of ours."""
    world_size: PositiveInt
    nodes: PositiveInt = 1
    batch_size: PositiveInt = 1
    gpu: str
    """Name as the driver reports it."""
    profile: str
    """The machine profile of that hardware."""
    stack: str
    """The stack preset that comes closest."""
    kernel: str
    """The attention kernel that was used, where a method does not name another."""
    memory: str = Field(min_length=1)
    """What kind of peak and which unit."""
    sources: dict[str, Source]
    methods: tuple[PublishedMethod, ...] = Field(min_length=1, strict=False)

    def value(self, method: str, seq_len: int) -> tuple[PublishedMethod, PublishedValue] | None:
        """Return what is published of a case, or None."""
        for found in self.methods:
            for value in found.values:
                if (found.method, value.seq_len) == (method, seq_len):
                    return found, value
        return None

    @model_validator(mode="after")
    def _agrees(self) -> Published:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version {self.format_version} is not {FORMAT_VERSION}")
        cases = Counter((m.method, v.seq_len) for m in self.methods for v in m.values)
        twice = [f"{method} at {length}" for (method, length), count in cases.items() if count > 1]
        if twice:
            raise ValueError(f"given twice: {', '.join(twice)}")
        named = {m.source for m in self.methods}
        named |= {s for m in self.methods for v in m.values for s in (v.source, v.memory_source) if s}
        unknown = sorted(named - set(self.sources))
        if unknown:
            raise ValueError(f"no such source: {', '.join(unknown)}")
        return self


def load_published(folder: Path) -> tuple[Published, ...]:
    """Return the published comparisons of a folder (`*.toml`), by file name; none if there is no such folder.

    Raises:
        UsageError: a file cannot be read, is not TOML, or is no published comparison.
    """
    return tuple(read_published(path) for path in sorted(folder.glob("*.toml")))


def read_published(path: Path) -> Published:
    """Return the comparison in one file; errors as in `load_published`."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"published results {path} cannot be read: {error}") from error
    try:
        return Published.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"published results {path}: {_explain(error.errors()[0])}") from error


def _explain(problem: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = {
            name
            for model in (Published, PublishedMethod, PublishedValue, Source)
            for name in model.model_fields
        }
        near = nearest(str(problem["loc"][-1]), sorted(known))
        return f"unknown key {where!r}" + (f"; did you mean {near!r}?" if near else "")
    return f"{where + ': ' if where else ''}{problem['msg'].removeprefix('Value error, ')}"
