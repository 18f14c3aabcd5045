"""The pages of methods: their pictures show what a fresh run does, and the formulas."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cpbench import registry
from cpbench.block_schedule import BlockSchedule
from cpbench.errors import CpbenchError
from cpbench.report import method_pages
from cpbench.report.schedules import Block, _stacked, write_schedule

RECORDED = ("single", "ring", "ulysses", "usp", "fpdt", "offload", "upipe", "torch-ring")
TILES = 0.1  # of M: what the tiles of a merge may add to a formula


def structure(s: BlockSchedule) -> object:
    return (
        [(bar.lane, bar.kind, bar.name, bar.start, bar.stop) for bar in s.bars],
        s.phases,
        s.sent,
        sorted(name for name in s.alive if name != "tiles"),
    )


def differences(kept: BlockSchedule, fresh: BlockSchedule) -> list[str]:
    found = [] if structure(kept) == structure(fresh) else ["structure"]
    for name in ("forward_peak_bytes", "backward_peak_bytes"):
        if abs(getattr(kept, name) - getattr(fresh, name)) > 0.01 * getattr(fresh, name):
            found.append(name)
    return found


@pytest.mark.slow
def test_a_fresh_run_does_what_the_pictures_show() -> None:
    """Every method, run again, gives the kept operations, exchanges and peaks; a kept file that differs is found."""
    kept = [s for method in RECORDED for s in method_pages.load(method)]
    for _ in range(
        3
    ):  # gloo's threads may free a buffer late, which then adds to a peak: not three times in a row
        fresh = method_pages.record(RECORDED)
        assert [(s.method, s.given) for s in kept] == [(s.method, s.given) for s in fresh]
        differing = [s.method for s, now in zip(kept, fresh, strict=True) if differences(s, now)]
        if not differing:
            break
    assert not differing
    broken = kept[0].model_copy(update={"bars": kept[0].bars[1:], "backward_peak_bytes": 1})
    assert differences(broken, fresh[0]) == ["structure", "backward_peak_bytes"]


@pytest.mark.parametrize("method", RECORDED)
def test_recorded_peaks_and_bytes_are_those_of_the_formulas(method: str) -> None:
    """Kept peaks equal the formulas but for a few tiles, and exactly as many bytes were sent."""
    for s in method_pages.load(method):
        for recorded, stated in (
            (s.forward_peak_bytes, s.stated_forward_peak_bytes),
            (s.backward_peak_bytes, s.stated_backward_peak_bytes),
        ):
            assert 0 <= s.in_units(recorded - stated) <= TILES
        assert s.sent_by_kind("forward") == s.stated_sent["forward"]
        assert s.sent_by_kind("backward") == s.stated_sent["backward"]
        assert max(s.totals()) == max(s.forward_peak_bytes, s.backward_peak_bytes)


@pytest.mark.parametrize("method", RECORDED)
def test_a_page_holds_the_tables_of_its_kept_data(method: str) -> None:
    """The tables of a page are those that the kept data and the method's source give today."""
    page = (method_pages.FOLDER / f"{method}.md").read_text(encoding="utf-8")

    assert method_pages.replaced(page, method_pages.tables(method, method_pages.load(method))) == page


@pytest.mark.parametrize("method", RECORDED)
def test_everything_in_a_picture_has_a_name(method: str) -> None:
    """No bar is without a name, and the colours of the stack add up to what is alive; a name unknown to it is found."""
    for s in method_pages.load(method):
        assert unnamed(s) == []
    strange = {"strange" if name == "q" else name: sizes for name, sizes in s.alive.items()}
    broken = s.model_copy(
        update={"alive": strange, "bars": (s.bars[0].model_copy(update={"name": "?"}), *s.bars)}
    )
    assert unnamed(broken) == ["bar 0", "stack"]


def unnamed(s: BlockSchedule) -> list[str]:
    found = [f"bar {index}" for index, bar in enumerate(s.bars) if bar.name in ("", "?")]
    drawn = [sum(column) for column in zip(*_stacked(s).values(), strict=True)]
    return found + (["stack"] if drawn != s.totals() else [])


def test_every_method_has_a_page_that_the_documentation_names() -> None:
    """Every built-in method has a page in the list of methods; its picture and every linked file exist."""
    listed = (method_pages.FOLDER / "README.md").read_text(encoding="utf-8")

    for method in registry.method_files():
        assert f"({method}.md)" in listed, method
        page = (method_pages.FOLDER / f"{method}.md").read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)\)", page + listed):
            assert link.startswith("https://") or (method_pages.FOLDER / link).exists(), link


def test_a_page_without_marks_is_refused() -> None:
    """A page that lost its marks is not overwritten."""
    with pytest.raises(CpbenchError, match="two marks"):
        method_pages.replaced("# ring\n", "text")


def test_options_come_from_the_source(tmp_path: Path) -> None:
    """Names, defaults and docstrings of the options, in order."""
    source = tmp_path / "mine.py"
    source.write_text(
        'class Mine:\n    """Words."""\n    size: int = 3\n    """How\n    many."""\n\nMETHOD = Mine\n'
    )

    assert method_pages.method_options(source) == [("size", "3", "How many.")]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    """A PNG of two recordings, one with and one without host memory, on one scale."""
    blocks = [Block(s, "heading") for s in (*method_pages.load("single"), *method_pages.load("offload"))]

    write_schedule(blocks, "title", "subtitle\nof two lines", tmp_path / "picture.png")

    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
