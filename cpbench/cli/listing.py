"""`cpbench list`: the names that other commands take."""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpbench import registry
from cpbench.cli import flags
from cpbench.folders import scenario_folders
from cpbench.hardware import load_hardware, profile_names
from cpbench.model_config import PRESETS
from cpbench.units import format_bytes


class Kind(StrEnum):
    """What can be listed."""

    METHODS = "methods"
    MODELS = "models"
    SCENARIOS = "scenarios"
    HARDWARE = "hardware"


def list_(
    kind: Annotated[str, typer.Argument(metavar="|".join(Kind), help="What to list.")],
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin", metavar="FILE", help="Python file of a method outside the tree; repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """List methods with their options, models, scenarios or machine profiles."""
    kind = Kind(str(flags.choice("list", kind, [str(one) for one in Kind])))
    if kind is Kind.METHODS:
        rows = _methods(tuple(plugin or ()))
    elif kind is Kind.MODELS:
        rows = _models()
    elif kind is Kind.SCENARIOS:
        rows = _scenarios()
    else:
        rows = _hardware()
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    console = Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for row in rows:
        text = Text(row["description"])
        for option in row.get("options", ()):
            text.append(f"\n{option['name']}={option['default']}", style="bold").append(f"  {option['doc']}")
        table.add_row(Text(row["name"]), text)
    console.print(table)


def _methods(plugins: tuple[Path, ...]) -> list[dict[str, Any]]:
    files = registry.method_files(plugins)
    return [
        {
            "name": name,
            "description": registry.describe(path),
            "options": [dataclasses.asdict(option) for option in registry.options_of(path)],
        }
        for name, path in files.items()
    ]


def _models() -> list[dict[str, Any]]:
    rows = []
    for name, model in PRESETS.items():
        shape = f"{model.num_layers} layers, hidden {model.hidden_dim}, {model.num_heads} heads"
        description = f"{_millions(model.num_params)} parameters: {shape}, {model.num_kv_heads} KV heads"
        config = model.model_dump(mode="json")
        rows.append(
            {"name": name, "description": description, "num_params": model.num_params, "architecture": config}
        )
    return rows


def _scenarios() -> list[dict[str, Any]]:
    files = [file for folder in scenario_folders() for file in sorted(folder.glob("*.toml"))]
    return [{"name": file.stem, "description": _question(file), "file": str(file)} for file in files]


def _hardware() -> list[dict[str, Any]]:
    rows = []
    for name in profile_names():
        profile = load_hardware(name)
        memory, host = format_bytes(profile.device_memory_bytes), format_bytes(profile.host_memory_bytes)
        description = f"{profile.gpus_per_node} x {profile.gpu}, {memory} each, {host} host memory"
        rows.append({"name": name, "description": description, "profile": profile.model_dump(mode="json")})
    return rows


def _millions(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def _question(file: Path) -> str:
    """The first sentence of a scenario's header comment."""
    lines = file.read_text(encoding="utf-8").splitlines()
    first = lines[0] if lines else ""
    return first.lstrip("# ").strip() if first.startswith("#") else "(no question in its header)"
