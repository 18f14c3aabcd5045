"""A scenario: one question, as a TOML file or as command-line flags, expanded to requested cases.

```toml
# Which method needs least memory as the context grows?     <- the header comment asks the question
description = "..."

[run]                      # one value each: how every case is run
mode = "measure"           # auto | measure | emulate | estimate
steps = 3
layers = 2                 # so many layers of every model; all when left out

[sweep]                    # lists multiply: the axes
method = ["ring", "upipe"]
seq_len = ["8K", "16K"]
world_size = [4]

[stack]                    # changes to the stack presets of the sweep, for every case
tile_mlp = false

[options.upipe]            # method options; a list is one more axis for that method
stage_heads = [8, 16]

[models.toy]               # models of this scenario, beside the presets
hidden_dim = 64            # ... every field of ModelConfig

[[exclude]]                # a case matching every key of one rule is left out; a list matches any of its values
method = "ring"
seq_len = "16K"
```

Files are untrusted input: unknown keys are refused with the nearest valid one, nothing is interpolated or imported.
"""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import ValidationError as PydanticValidationError

from cpbench.case import AttentionBackend, Case, Device, Dtype, Mode, OptionValue, Stack, stack_by_name
from cpbench.errors import CpbenchError, ScenarioError, UnknownName, UsageError
from cpbench.hardware import load_hardware, nodes_of
from cpbench.model_config import ModelConfig, load_model
from cpbench.plain_words import problems_of
from cpbench.units import parse_bytes, parse_length


def _as_tuple(value: Any) -> tuple[Any, ...]:  # noqa: ANN401 - raw TOML before validation
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _as_bytes(value: Any) -> Any:  # noqa: ANN401 - raw TOML before validation
    try:
        return parse_bytes(value) if isinstance(value, str) else value
    except UsageError as error:
        raise ValueError(str(error)) from error


def _as_lengths(value: Any) -> Any:  # noqa: ANN401 - raw TOML before validation
    try:
        return tuple(parse_length(item) for item in _as_tuple(value))
    except UsageError as error:
        raise ValueError(str(error)) from error


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Counts = Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Lengths = Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_lengths), Field(min_length=1)]
Dtypes = Annotated[tuple[Dtype, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Bytes = Annotated[PositiveInt | None, BeforeValidator(_as_bytes)]
OptionValues = Annotated[tuple[OptionValue, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RunSettings(_Section):
    """How every case of the scenario is run."""

    mode: Mode | Literal["auto"] = "auto"
    device: Device | None = None
    """None: cuda when GPUs are visible, else cpu."""
    hardware: str = "h100-80g"
    """Machine profile of estimates, and of the communication of emulated cases."""
    host_memory_bytes: Bytes = None
    """Of a node that estimates are for, as an integer or a text such as "1.5 TiB"; None: what the profile says."""
    rank: NonNegativeInt | None = None
    """The one rank that is emulated or estimated; None: rank 0."""
    layers: PositiveInt | None = None
    """Layers of every model that run; None: all."""
    nodes: PositiveInt | None = None
    """Machines; None: this one where ranks run, and where they do not as many of the profile's nodes as they fill."""
    steps: PositiveInt = 3
    warmup: NonNegativeInt = 2
    seed: NonNegativeInt = 0
    timeout_seconds: PositiveFloat = 1800.0
    """A case that takes longer is ended and gets status `timeout`."""
    attention_backend: AttentionBackend = "auto"

    def nodes_of_case(self, world_size: int, *, mode: Mode, device: Device) -> int:
        """Return the machines of a case.

        Raises:
            UsageError: they are not given, and the ranks fill some of the profile's nodes only in part.
        """
        if self.nodes is not None:
            return self.nodes
        if mode == "measure" or device == "cpu":
            return 1
        return nodes_of(world_size, load_hardware(self.hardware))


class Axes(_Section):
    """The lists that multiply."""

    method: Strings = ("upipe",)
    model: Strings = ("llama3-8b",)
    seq_len: Lengths = (131072,)
    world_size: Counts = (8,)
    batch_size: Counts = (1,)
    dtype: Dtypes = ("bfloat16",)
    stack: Strings = ("long",)


class StackChanges(_Section):
    """Changes to the stack presets; None keeps the preset's value."""

    checkpoint: Literal["none", "full"] | None = None
    offload: Literal["none", "inputs"] | None = None
    tile_mlp: bool | None = None
    tile_norm: bool | None = None
    tile_loss: bool | None = None
    optimizer_offload: bool | None = None
    save_attention: NonNegativeInt | Literal["auto"] | None = None
    host_budget_bytes: Bytes = None
    """An integer, or a text such as "1.5 TiB"."""


class Exclude(_Section):
    """A rule that leaves cases out: every given key must match; a list matches any of its values."""

    method: Strings | None = None
    model: Strings | None = None
    seq_len: Lengths | None = None
    world_size: Counts | None = None
    batch_size: Counts | None = None
    dtype: Dtypes | None = None
    stack: Strings | None = None

    def matches(self, point: dict[str, Any]) -> bool:
        """Return whether a point of the sweep, given as axis name to value, is left out by this rule."""
        rule = {key: values for key, values in self if values is not None}
        return bool(rule) and all(point[key] in values for key, values in rule.items())

    @property
    def words(self) -> str:
        """The rule as text, for messages."""
        rule = self.model_dump(exclude_none=True)
        return ", ".join(f"{key} = {', '.join(map(str, values))}" for key, values in rule.items())


class Scenario(_Section):
    """One question as data; `expand` gives the cases that answer it."""

    name: str = "custom"
    description: str = ""
    run: RunSettings = RunSettings()
    sweep: Axes = Axes()
    stack: StackChanges = StackChanges()
    options: dict[str, dict[str, OptionValues]] = Field(default_factory=dict)
    models: dict[str, ModelConfig] = Field(default_factory=dict)
    exclude: Annotated[tuple[Exclude, ...], BeforeValidator(_as_tuple)] = ()

    def expand(self, *, mode: Mode, device: Device) -> list[Case]:
        """Return the requested cases in a stable order: method, model, stack, dtype, batch, world, length.

        Args:
            mode: the mode chosen for `auto`, or the scenario's own.
            device: where measured tensors live.

        Raises:
            UnknownName: a model or stack that does not exist.
            ScenarioError: the exclude rules leave nothing, or a model has fewer layers than asked for.
            UsageError: ranks that fill nodes of the machine profile only in part.
        """
        axes = self.sweep
        models = {
            name: (name, self.models[name]) if name in self.models else load_model(name)
            for name in axes.model
        }
        layers = {name: self._layers(name, architecture) for name, (_, architecture) in models.items()}
        stacks = {name: self._changed(stack_by_name(name)) for name in axes.stack}
        nodes = {world: self.run.nodes_of_case(world, mode=mode, device=device) for world in axes.world_size}
        names = ("method", "model", "stack", "dtype", "batch_size", "world_size", "seq_len")
        hardware = self.run.hardware if mode != "measure" and device == "cuda" else None
        judged = mode == "estimate" and hardware is not None
        cases: list[Case] = []
        for values in itertools.product(*(getattr(axes, name) for name in names)):
            point = dict(zip(names, values, strict=True))
            if any(rule.matches(point) for rule in self.exclude):
                continue
            model, architecture = models[point["model"]]
            running, model_layers = layers[point["model"]]
            for options in self._option_sets(point["method"]):
                cases.append(
                    Case(
                        **(point | {"model": model, "stack": stacks[point["stack"]]}),
                        architecture=architecture.model_copy(update={"num_layers": running}),
                        model_layers=model_layers,
                        options=options,
                        nodes=nodes[point["world_size"]],
                        mode=mode,
                        device=device,
                        rank=self.run.rank,
                        hardware=hardware,
                        host_memory_bytes=self.run.host_memory_bytes if judged else None,
                        steps=self.run.steps,
                        warmup=self.run.warmup,
                        seed=self.run.seed,
                        attention_backend=self.run.attention_backend,
                    )
                )
        if not cases:
            raise ScenarioError(f"scenario {self.name!r}: the exclude rules leave no case; remove a rule")
        return list({case.case_id: case for case in cases}.values())

    def idle_rules(self) -> list[Exclude]:
        """Return the exclude rules that leave out no case of this scenario."""
        names = list(Exclude.model_fields)
        points = [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*(getattr(self.sweep, name) for name in names))
        ]
        return [rule for rule in self.exclude if not any(rule.matches(point) for point in points)]

    def _layers(self, name: str, architecture: ModelConfig) -> tuple[int, int | None]:
        """Layers that run, and of how many if not all do."""
        there, wanted = architecture.num_layers, self.run.layers
        if wanted is None or wanted == there:
            return there, None
        if wanted > there:
            raise ScenarioError(
                f"scenario {self.name!r}: layers={wanted}, but model {name} has {there}; give at most {there}"
            )
        return wanted, there

    def _changed(self, stack: Stack) -> Stack:
        return stack.model_copy(update={key: value for key, value in self.stack if value is not None})

    def _option_sets(self, method: str) -> list[dict[str, OptionValue]]:
        lists = self.options.get(method, {})
        return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def parse_scenario(text: str, *, name: str, file: Path | None = None) -> Scenario:
    """Return the scenario in a TOML document.

    Args:
        text: the document.
        name: of the scenario.
        file: where it is from, for messages.

    Raises:
        ScenarioError: not TOML, unknown key (with the nearest valid one), or a wrong value.
    """
    what = _called(name, file)
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{what} is not valid TOML: {error}") from error
    if "name" in raw:
        raise ScenarioError(f"{what}: its name is the file name; remove the key 'name'")
    return build_scenario({**raw, "name": name}, file=file)


def build_scenario(raw: dict[str, Any], *, file: Path | None = None) -> Scenario:
    """Validate a scenario given as nested dictionaries (from TOML and command-line flags).

    Raises:
        ScenarioError: every problem found, one a line.
    """
    what = _called(str(raw.get("name", "?")), file)
    try:
        return Scenario.model_validate(raw)
    except PydanticValidationError as error:
        lines = problems_of(error, Scenario, hidden=("name",))
        raise ScenarioError(f"{what}: " + "\n  ".join(lines)) from error
    except CpbenchError as error:
        raise ScenarioError(f"{what}: {error}") from error


def load_scenario(name_or_path: str, *, folders: list[Path]) -> Scenario:
    """Return the scenario of a file, or of a name looked up as `<folder>/<name>.toml`.

    Raises:
        ScenarioError: it cannot be read or is malformed.
        UnknownName: no such file and no such name.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and not path.is_file():
        known = {file.stem: file for folder in folders for file in sorted(folder.glob("*.toml"))}
        if name_or_path not in known:
            raise UnknownName("scenario", name_or_path, known)
        path = known[name_or_path]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ScenarioError(f"scenario file {path} cannot be read: {why}") from error
    return parse_scenario(text, name=path.stem, file=path)


def _called(name: str, file: Path | None) -> str:
    return f"scenario {name!r}" if file is None else f"scenario {name!r} (file {file})"


__all__ = [
    "Axes",
    "Exclude",
    "RunSettings",
    "Scenario",
    "StackChanges",
    "build_scenario",
    "load_scenario",
    "parse_scenario",
]
