"""The two halves stay apart; every rule also finds a violation planted in the project's sources."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_rules import (
    ORCHESTRATOR_LIBRARIES,
    TORCH,
    chains_to,
    cycles,
    forbidden_in_methods,
    names_methods,
    read_sources,
    unclassified,
    wrong_directions,
)

ROOT = Path(__file__).resolve().parents[1]
TORCH_FREE = {"nouns", "orchestrator"}
MEASURED = {"nouns", "measured"}
HEAVY = {"torch", "pandas", "pyarrow", "matplotlib", "plotly", "jinja2"}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return read_sources(ROOT)


def planted(sources: dict[str, str], name: str, line: str) -> dict[str, str]:
    """The sources with a line at the end of a module, new or not."""
    return sources | {name: f"{sources.get(name, '')}\n{line}\n"}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in `sys.modules` of a fresh interpreter after a statement."""
    code = (
        f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return set(json.loads(ended.stdout))


def test_every_module_has_a_class(sources: dict[str, str]) -> None:
    """Each module of cpbench is a noun, or belongs to the orchestrator or to the measured half."""
    assert unclassified(sources) == []


def test_a_module_without_a_class_is_found(sources: dict[str, str]) -> None:
    """A new module is refused with the place to add it to."""
    found = unclassified(planted(sources, "cpbench.utils", ""))

    assert found == [
        "cpbench.utils has no class: add it to NOUNS, ORCHESTRATOR or MEASURED in tests/import_rules.py"
    ]


def test_nouns_and_orchestrator_reach_no_torch(sources: dict[str, str]) -> None:
    """The command line, the sweep and the report import no torch, directly or through others, lazily or not."""
    assert chains_to(TORCH, TORCH_FREE, sources) == []


@pytest.mark.parametrize(
    ("name", "line", "chain"),
    [
        ("cpbench.units", "import torch", "cpbench.cli.flags -> cpbench.units -> torch"),
        ("cpbench.report.load", "def f():\n    from torch import Tensor", "cpbench.report.load -> torch"),
        (
            "cpbench.cli.flags",
            "from cpbench.runtime import streams",
            "cpbench.cli.flags -> cpbench.runtime.streams -> torch",
        ),
    ],
)
def test_torch_in_the_orchestrator_is_found(
    sources: dict[str, str], name: str, line: str, chain: str
) -> None:
    """Torch is found in a noun, inside a function, and behind another module; the chain of imports is shown."""
    assert chain in chains_to(TORCH, TORCH_FREE, planted(sources, name, line))


def test_an_import_for_the_type_checker_is_no_import(sources: dict[str, str]) -> None:
    """`if TYPE_CHECKING:` may name torch anywhere."""
    line = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"

    assert chains_to(TORCH, TORCH_FREE, planted(sources, "cpbench.units", line)) == []


def test_measured_processes_carry_no_orchestrator_library(sources: dict[str, str]) -> None:
    """Tables, plots and the command line stay out of the measured processes, whose memory is the result."""
    assert chains_to(ORCHESTRATOR_LIBRARIES, MEASURED, sources) == []


@pytest.mark.parametrize("name", ["cpbench.record", "cpbench.train", "cpbench.memory.timeline"])
def test_an_orchestrator_library_in_a_measured_process_is_found(sources: dict[str, str], name: str) -> None:
    """Pandas in a noun or in the measured half is found, also inside a function."""
    found = chains_to(
        ORCHESTRATOR_LIBRARIES, MEASURED, planted(sources, name, "def f():\n    import pandas as pd")
    )

    assert f"{name} -> pandas" in found


def test_halves_meet_only_in_the_nouns(sources: dict[str, str]) -> None:
    """Neither half imports the other, and nouns import neither."""
    assert wrong_directions(sources) == []


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "cpbench.train",
            "from cpbench import sweep",
            "cpbench.train (measured) imports cpbench.sweep (orchestrator)",
        ),
        (
            "cpbench.sweep",
            "import cpbench.resolve",
            "cpbench.sweep (orchestrator) imports cpbench.resolve (measured)",
        ),
        (
            "cpbench.case",
            "from cpbench.launch import Job",
            "cpbench.case (nouns) imports cpbench.launch (orchestrator)",
        ),
    ],
)
def test_an_import_across_is_found(sources: dict[str, str], name: str, line: str, message: str) -> None:
    """An import from one half into the other is named with both classes."""
    assert wrong_directions(planted(sources, name, line)) == [message]


def test_methods_import_only_the_seam_and_the_runtime(sources: dict[str, str]) -> None:
    """A method file is readable on its own: it imports what a method needs, and no other method."""
    assert forbidden_in_methods(sources) == []


@pytest.mark.parametrize("line", ["from methods.ring import Ring", "import cpbench.train", "import pandas"])
def test_a_foreign_import_in_a_method_is_found(sources: dict[str, str], line: str) -> None:
    """A method that imports another method, the training step or pandas is found."""
    found = forbidden_in_methods(planted(sources, "methods.single", line))

    assert [f"methods.single imports {line.split()[1]}"] == found


def test_only_the_registry_names_the_package_of_methods(sources: dict[str, str]) -> None:
    """Nothing but the registry can find a method, so one file adds a method."""
    assert names_methods(sources) == []


@pytest.mark.parametrize(
    "line", ["from methods import ring", "import_module('methods.ring')", "PACKAGE = 'methods'"]
)
def test_another_module_that_names_methods_is_found(sources: dict[str, str], line: str) -> None:
    """An import of a method, or a string from which one could be made, is found outside the registry."""
    assert len(names_methods(planted(sources, "cpbench.train", line))) == 1


def test_there_are_no_import_cycles(sources: dict[str, str]) -> None:
    """Modules can be read from the bottom up."""
    assert cycles(sources) == []


@pytest.mark.parametrize("line", ["from cpbench.sweep import Sweep", "def f():\n    import cpbench.sweep"])
def test_a_cycle_is_found(sources: dict[str, str], line: str) -> None:
    """A cycle is found, also when a function hides half of it."""
    found = cycles(planted(sources, "cpbench.units", line))

    assert any("cpbench.sweep" in text and "cpbench.units" in text for text in found)


def test_the_command_line_starts_without_heavy_libraries() -> None:
    """`import cpbench.cli` loads neither torch nor anything that only a report needs."""
    assert loaded_by("import cpbench.cli") & HEAVY == set()


def test_a_heavy_library_at_start_is_found() -> None:
    """The same look at `sys.modules` sees a library that was loaded."""
    assert loaded_by("import cpbench.cli, jinja2") & HEAVY == {"jinja2"}
