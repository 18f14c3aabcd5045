"""The wheel holds what it should, and works on its own, outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed; its environment is ours with some variables set."""
    ended = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, f"{command}:\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        folder,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel is installed; its dependencies are those of this environment."""
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    run(pip, target)
    return target


def cpbench(site: Path, cwd: Path, *arguments: str) -> str:
    """Output of `python -m cpbench` as installed from the wheel, run in another folder."""
    # PYTHONPATH comes before the environment's own packages, where the checkout may be installed.
    return run([sys.executable, "-m", "cpbench", *arguments], cwd, PYTHONPATH=str(site), COLUMNS="200")


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    """A wheel adds `cpbench` and `methods` to an environment, and no tests, scenarios or reports beside them."""
    names = zipfile.ZipFile(wheel).namelist()

    top = {name.split("/")[0] for name in names}
    (metadata,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {"cpbench", "methods", metadata}


def test_the_wheel_holds_the_data_and_the_types(wheel: Path) -> None:
    """Templates, scenarios, profiles, reference results, the licence and the marker of types travel with the code."""
    names = zipfile.ZipFile(wheel).namelist()

    for path in (ROOT / "scenarios").glob("*.toml"):
        assert f"cpbench/_scenarios/{path.name}" in names
    for path in (ROOT / "reports" / "templates").iterdir():
        assert f"cpbench/_templates/{path.name}" in names
    for path in (ROOT / "cpbench" / "profiles").glob("*.toml"):
        assert f"cpbench/profiles/{path.name}" in names
    assert "cpbench/_results/README.md" in names
    assert "cpbench/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_installed_code_is_that_of_the_wheel(site: Path, tmp_path: Path) -> None:
    """What the other tests of this file run is the wheel's code, not the checkout's."""
    code = "import cpbench, methods; print(cpbench.__file__); print(methods.__file__)"

    found = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(site)).split()

    assert found == [str(site / "cpbench" / "__init__.py"), str(site / "methods" / "__init__.py")]


def test_the_installed_command_lists_methods_and_scenarios(site: Path, tmp_path: Path) -> None:
    """Outside the checkout the built-in methods and scenarios are found."""
    methods = json.loads(cpbench(site, tmp_path, "list", "methods", "--json"))
    scenarios = json.loads(cpbench(site, tmp_path, "list", "scenarios", "--json"))

    files = [path for path in (ROOT / "methods").glob("*.py") if not path.name.startswith("_")]
    assert {path.stem.replace("_", "-") for path in files} == {row["name"] for row in methods}
    assert {path.stem for path in (ROOT / "scenarios").glob("*.toml")} == {row["name"] for row in scenarios}


def test_the_installed_command_plans_a_sweep(site: Path, tmp_path: Path) -> None:
    """Outside the checkout a dry run resolves every case with its method and writes nothing."""
    plan = json.loads(cpbench(site, tmp_path, "sweep", "--scenario", "smoke", "--dry-run", "--json"))

    assert len(plan["cases"]) == 12
    assert all(case["unsupported"] is None for case in plan["cases"])
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_sweeps_and_reports(site: Path, tmp_path: Path) -> None:
    """Outside the checkout an estimate is made by the wheel's methods and reported by its templates."""
    shape = ("--model", "tiny", "--method", "ulysses", "--seqlen", "4K", "--world", "2", "--dtype", "float32")
    cpbench(site, tmp_path, "sweep", *shape, "--mode", "estimate", "--device", "cpu", "--name", "small")
    report = json.loads(cpbench(site, tmp_path, "report", "small", "--json"))

    page = Path(report["page"])
    text = (tmp_path / page).read_text(encoding="utf-8")
    assert "ulysses" in text
    (record,) = (tmp_path / "runs" / "small" / "cases").glob("*.json")
    assert json.loads(record.read_text(encoding="utf-8"))["status"] == "ok"
