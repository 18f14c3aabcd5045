"""`cpbench explain` on small cases: numbers that the estimate confirms, files, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cpbench.cli import app
from cpbench.explanation import Explanation
from cpbench.record import read_record
from cpbench.report.explanation import categories, write_explanation
from cpbench.units import format_bytes

TINY = ("--model", "tiny", "--seqlen", "4K", "--world", "4", "--dtype", "float32", "--device", "cpu")


def run(*arguments: str) -> list[Explanation]:
    result = CliRunner().invoke(app, ["explain", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return [Explanation.model_validate(item) for item in json.loads(result.stdout)]


@pytest.mark.slow
def test_two_cases_are_taken_apart_and_compared(tmp_path: Path) -> None:
    """Two cases: parts add up, an untiled MLP is estimated to take more, page and picture are written."""
    found = run("--method", "ulysses,upipe", *TINY)

    for e in found:
        assert sum(c.bytes for c in e.anatomy.categories) == e.anatomy.peak_bytes
        assert all(c.peak_without_bytes < e.anatomy.peak_bytes for c in e.anatomy.categories if c.bytes)
        effects = {o.option: o.peak_bytes for o in e.options}
        assert effects.keys() >= {"tile_mlp", "tile_loss", "optimizer_offload", "checkpoint"}
        assert (effects["tile_mlp"] or 0) >= e.anatomy.peak_bytes
    assert dict(categories(found))["attention"][0] > dict(categories(found))["attention"][1]
    page, picture = write_explanation(found, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http-equiv", "")
    assert found[0].case.title in text


@pytest.mark.slow
def test_a_case_of_a_run_is_explained(tmp_path: Path) -> None:
    """A case named by the beginning of its id has the peak of its record; page and picture are written."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    shape = ("--model", "tiny", "--seqlen", "1K", "--world", "2", "--dtype", "float32", "--device", "cpu")
    where = ("--mode", "estimate", "--name", "small", "--runs", str(runs))
    swept = CliRunner().invoke(app, ["sweep", "--method", "ulysses", *shape, *where])
    assert swept.exit_code == 0, swept.output
    (path,) = (runs / "small" / "cases").glob("*.json")
    record = read_record(path)

    arguments = ["small", "ulysses-1K", "--runs", str(runs), "--no-options", "--out", str(out)]
    told = CliRunner().invoke(app, ["explain", *arguments])

    assert told.exit_code == 0, told.output
    assert f"peak {format_bytes(record.peak_allocated_bytes)}" in told.output
    assert record.peak_by_category_bytes.keys() >= {"optimizer", "gradients"}
    for name, size in record.peak_by_category_bytes.items():
        if size:
            assert re.search(rf"^ *{name} +{re.escape(format_bytes(size))} ", told.output, re.MULTILINE)
    assert {file.name for file in out.iterdir()} == {"explain.html", "explain.png"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "ring,ulysses,upipe"), "3 cases"),
        (("nowhere", "upipe"), "neither a folder nor a run"),
        (("run", "case", "--method", "upipe"), "not both"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_wrong_usage_is_refused_in_words(arguments: tuple[str, ...], words: str) -> None:
    """More than two cases, a missing run, a run and flags together, an unknown device: exit code 2 and the reason."""
    result = CliRunner().invoke(app, ["explain", *arguments])

    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
