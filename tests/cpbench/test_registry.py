"""Finding methods: by file name, as plug-ins, with their options checked, without importing them."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from cpbench import registry
from cpbench.errors import MethodUnavailable, UnknownName, UsageError
from tests.cpbench.workers.harness import ROOT

PLUGIN = '''"""Mine: a method outside the tree."""
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    chunks: int = 4
    scale: float = 1.0
    order: str = "zigzag"

    def __post_init__(self):
        if self.chunks < 1:
            raise ValueError(f"chunks={self.chunks} must be at least 1")


METHOD = Options
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / f"mine_{uuid.uuid4().hex[:8]}.py"  # imported modules stay imported, so names are unique
    path.write_text(PLUGIN, encoding="utf-8")
    return path


def name_of(path: Path) -> str:
    return path.stem.replace("_", "-")


def test_built_in_methods_are_found_by_file_name() -> None:
    """The four methods of the tree are there, each described by the first line of its file."""
    files = registry.method_files()
    assert {"single", "ring", "ulysses", "upipe"} <= set(files)
    for path in files.values():
        assert not registry.describe(path).startswith("(")


def test_listing_imports_no_method_and_no_torch() -> None:
    """`list methods` is instant: neither a method nor torch is imported."""
    code = (
        "import sys; from cpbench import registry; [registry.describe(p) for p in registry.method_files().values()]; "
        "print([m for m in sys.modules if m == 'torch' or m.startswith('methods.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_plugin_is_a_method_like_any_other(plugin: Path) -> None:
    """A file outside the tree is listed, required, loaded and hashed."""
    name = name_of(plugin)
    assert registry.require(name, [plugin]) == plugin
    method = registry.load(name, {"chunks": 8}, [plugin])
    assert registry.resolved_options(method) == {"chunks": 8, "scale": 1.0, "order": "zigzag"}
    assert len(registry.source_hash(plugin)) == 12


def test_an_unknown_method_offers_the_nearest() -> None:
    """A misspelt method is refused with the right spelling."""
    with pytest.raises(UnknownName, match="did you mean 'ring'"):
        registry.require("rng")


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"chunk": 1}, "did you mean 'chunks'"),
        ({"chunks": "8"}, "must be int"),
        ({"chunks": True}, "must be int"),
        ({"chunks": 1.5}, "must be int"),
        ({"order": 3}, "must be str"),
        ({"chunks": 0}, "chunks=0 must be at least 1"),
    ],
)
def test_wrong_options_are_refused(plugin: Path, options: dict[str, object], phrase: str) -> None:
    """Unknown options, wrong types and values that the method refuses are the user's to mend."""
    with pytest.raises(UsageError) as caught:
        registry.load(name_of(plugin), options, [plugin])  # type: ignore[arg-type]
    assert phrase in str(caught.value)


def test_an_integer_is_a_float() -> None:
    """A whole number may be given for a float option, but not the other way round."""
    assert registry._compatible(2, float)
    assert not registry._compatible(2.0, int)


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ("import a_package_nobody_has", "cannot be imported"),
        ("1 / 0", "fails on import"),
        ("def", "fails on import"),
        ("x = 1", "must set METHOD"),
        ("METHOD = 3", "must set METHOD"),
    ],
)
def test_a_broken_plugin_is_one_sentence(tmp_path: Path, source: str, phrase: str) -> None:
    """A file that cannot be imported or defines no method is named with what is wrong."""
    path = tmp_path / f"broken_{uuid.uuid4().hex[:8]}.py"
    path.write_text(source, encoding="utf-8")
    with pytest.raises(MethodUnavailable, match=phrase):
        registry.load(name_of(path), {}, [path])


def test_plugin_files_are_checked_before_anything_runs(tmp_path: Path) -> None:
    """A missing file, another suffix, a bad name and a taken name are refused."""
    taken, bad, text = tmp_path / "ring.py", tmp_path / "Bad Name.py", tmp_path / "method.txt"
    for path in (taken, bad, text):
        path.write_text(PLUGIN, encoding="utf-8")
    for path, phrase in (
        (taken, "is taken"),
        (bad, "lower-case letters"),
        (text, "not a Python file"),
        (tmp_path / "missing.py", "not a Python file"),
    ):
        with pytest.raises(UsageError, match=phrase):
            registry.method_files([path])


def test_the_description_needs_no_working_file(tmp_path: Path) -> None:
    """A file with a syntax error, or without a docstring, still has a line in the list."""
    path = tmp_path / "broken.py"
    path.write_text("def", encoding="utf-8")
    assert "cannot be read" in registry.describe(path)
    path.write_text("x = 1", encoding="utf-8")
    assert registry.describe(path) == "(no docstring)"
