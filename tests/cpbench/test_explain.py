"""`cpbench explain` on small cases: numbers that the estimate confirms, files, and what it refuses."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cpbench.case import STACKS, Case, Stack
from cpbench.cli import app
from cpbench.cli.explain_text import chart, print_explanations, short_names
from cpbench.explain import CaseCannotRun, _changed, _rooms
from cpbench.explanation import Anatomy, CategoryEffect, Explanation, Moment, OptionEffect, PeakTensors
from cpbench.hardware import HOST_MARGIN, HOST_PROCESS_BYTES
from cpbench.model_config import PRESETS
from cpbench.record import read_record
from cpbench.report.explanation import write_explanation, write_picture
from cpbench.report.explanation_words import categories
from cpbench.units import GIB, TIB, format_bytes

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


def made_up(method: str = "ulysses", *, peak: int = 40 * GIB, at: int = 90, room: int = 41) -> Explanation:
    """One case with a peak at a moment of a hundred."""

    def moment(place: int, phase: str, size: int) -> Moment:
        return Moment(at=place, phase=phase, place="attention:0", by_category={"attention": size})

    tensor = PeakTensors(
        count=3,
        bytes=GIB,
        category="attention",
        site="ulysses_core.py:1234 a_function_with_a_long_name > another_function_with_a_long_name",
        made_in="step/backward/attention",
        shape=(8, 1, 524288, 4, 128),
        dtype="bfloat16",
        peak_without_bytes=peak - GIB,
    )
    timeline = [moment(k, "forward" if k < 40 else "backward", peak // 2) for k in range(0, 100, 5)]
    timeline.append(top := moment(at, "backward", peak))
    return Explanation(
        case=Case(
            method=method, model="llama3-8b", architecture=PRESETS["llama3-8b"], seq_len=4 * 2**20, world_size=8,
            mode="estimate", device="cuda", hardware="h100-80g",
        ),
        anatomy=Anatomy(
            peak_bytes=peak, host_bytes=128 * GIB, peak=top, events=100, unlisted_bytes=5,
            timeline=tuple(sorted(timeline, key=lambda moment: moment.at)), tensors=(tensor,),
            categories=(
                CategoryEffect(name="attention", bytes=peak, peak_without_bytes=1, phase_without="optimizer"),
            ),
        ),
        options=(OptionEffect(option="tile_mlp", value="false", peak_bytes=None, reason="it is not to be " * 9),),
        device_bytes=room * GIB,
        host_room_bytes=256 * GIB,
    )  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_shows_everything_in_any_window(width: int) -> None:
    """Memory over the step as a chart, where each tensor was made in full, limits, and the difference in a sentence."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_explanations([made_up(), made_up("upipe", peak=16 * GIB, room=15)], console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    flat = " ".join(text.split())
    assert "estimated peak 40.0 GiB in backward, attention:0" in flat
    assert "host memory of the rank 128 GiB; fits; device memory ends it first, 98% of it are taken" in flat
    made = "made by ulysses_core.py:1234 a_function_with_a_long_name > another_function_with_a_long_name"
    assert flat.count(f"8 x 1 x 524288 x 4 x 128 bfloat16, {made} in step/backward/attention") == 2
    assert " ".join(["it is not to be"] * 9) in flat
    assert "█" in text
    assert "|forward" in text
    assert "highest: forward 20.0 GiB, backward 40.0 GiB" in flat
    assert "ulysses needs 24.0 GiB more than upipe at its peak: attention +24.0 GiB." in flat
    assert "upipe does not fit: 1.00 GiB of device memory are missing." in flat
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_the_chart_has_the_peak_where_it_is() -> None:
    """The highest column is that of the peak, and a terminal without Unicode gets plain characters."""
    *lines, phases, highest = chart(made_up(at=90).anatomy.timeline, 111, unicode=True)
    assert lines[0].index("█") == 11 + 90 * 100 // 95
    assert lines[0].startswith("  40.0 GiB")
    assert phases.index("|backward") == 11 + 40 * 100 // 95
    assert highest == "highest: forward 20.0 GiB, backward 40.0 GiB"
    assert "".join(chart(made_up().anatomy.timeline, 60, unicode=False)).isascii()


def test_cases_are_named_by_what_differs() -> None:
    """Headings of a comparison hold no more than they must."""
    one = made_up("upipe")
    case = one.case.model_copy(update={"options": {"stage_heads": 8, "overlap": False}, "world_size": 4})
    other = one.case.model_copy(update={"options": {"stage_heads": 16, "overlap": False}, "world_size": 4})
    found = [one.model_copy(update={"case": each}) for each in (case, other)]
    assert short_names(found) == ["stage_heads=8", "stage_heads=16"]
    assert short_names([made_up("ring"), made_up("upipe")]) == ["ring", "upipe"]


@pytest.mark.parametrize("at", [1, 20, 30, 40, 49, 51, 60, 70, 95])
def test_the_picture_says_estimated_and_its_labels_do_not_overlap(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The label of the limit keeps clear of that of the peak, wherever the peak lies."""
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    write_picture([made_up(at=at), made_up("upipe", at=at)], tmp_path / "explain.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    assert "estimated" in figure.get_suptitle()
    for axes in figure.axes[:2]:
        labels = [t for t in axes.texts if isinstance(t, Annotation)]
        (room,) = (t for t in labels if t.get_text().startswith("room on"))
        (peak,) = (t for t in labels if "GiB\n" in t.get_text())
        assert not room.get_window_extent().overlaps(peak.get_window_extent())


def test_saving_attention_is_among_the_changes() -> None:
    """Every part of the stack is tried, saved attention too; without checkpointing nothing can be saved."""
    changes = {name: value for name, value, _ in _changed(STACKS["long"], 32)}
    assert changes["save_attention"] == "32"
    assert set(changes) == set(Stack.model_fields) - {"host_budget_bytes"}
    assert "save_attention" not in {name for name, _, _ in _changed(STACKS["plain"], 32)}


def test_every_method_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--method all` shows each, leaves out what cannot run and says so; a pipe gets a line for each."""

    def explained(case: Case, plugins: object, *, options: bool, said: Callable[[str], None]) -> Explanation:
        said(f"estimating {case.method}")
        if case.method == "single":
            raise CaseCannotRun("single: world_size=8 is not 1")
        return made_up(case.method)

    monkeypatch.setattr("cpbench.cli.explain.explain", explained)
    result = CliRunner().invoke(app, ["explain", "--method", "all", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for method in ("fpdt", "offload", "ring", "torch-ring", "ulysses", "upipe", "usp"):
        assert re.search(rf"^{method}  +40.0 GiB", result.stdout, re.MULTILINE)
        assert f"] estimating {method}\n" in result.stderr
    assert "left out: single: world_size=8 is not 1" in result.stderr


@pytest.mark.parametrize(("flags", "node"), [((), 2 * TIB), (("--host-ram", "512G"), TIB // 2)])
def test_host_memory_is_that_of_the_flag(
    flags: tuple[str, ...], node: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--host-ram instead of the profile's memory decides what 8 ranks on a node may pin."""
    seen: list[Case] = []

    def explained(case: Case, plugins: object, *, options: bool, said: Callable[[str], None]) -> Explanation:
        seen.append(case)
        return made_up()

    monkeypatch.setattr("cpbench.cli.explain.explain", explained)
    result = CliRunner().invoke(app, ["explain", *flags, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    (case,) = seen
    assert case.host_memory_bytes == (node if flags else None)
    room = (node - round(node * HOST_MARGIN) - 8 * HOST_PROCESS_BYTES) // 8
    assert _rooms(case)["host_room_bytes"] == room


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "ring,ulysses,upipe", "--seqlen", "1K,2K,3K,4K,5K,6K"), "18 cases"),
        (("nowhere", "upipe"), "neither a folder nor a run"),
        (("run", "case", "--method", "upipe"), "not both"),
        (("run", "case", "--host-ram", "1T"), "not both"),
        (("--host-ram", "much"), "much"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_wrong_usage_is_refused_in_words(arguments: tuple[str, ...], words: str) -> None:
    """Too many cases, a missing run, a run and flags together, an unknown device: exit code 2 and the reason."""
    result = CliRunner().invoke(app, ["explain", *arguments])

    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
