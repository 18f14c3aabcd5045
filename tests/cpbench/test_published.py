"""Published results as files: the committed ones can be read, and everything wrong in one is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench.case import STACKS
from cpbench.errors import UsageError
from cpbench.folders import published_folder
from cpbench.hardware import load_hardware
from cpbench.model_config import PRESETS
from cpbench.published import load_published, read_published
from cpbench.units import GIB

GOOD = """
format_version = 1
title = "A paper"
short = "Paper"
arxiv = "2602.21196"
model = "llama3-8b"
world_size = 8
gpu = "NVIDIA H100 80GB HBM3"
profile = "h100-80g"
stack = "long"
kernel = "FlashAttention-3"
memory = "peak in GiB"

[sources.table]
text = "table 1"
url = "https://example.org/paper"

[[methods]]
method = "upipe"
name = "UPipe"
source = "table"
values = [
  { seq_len = "128K", tokens_per_second_per_gpu = 2000.0, peak_gib = 21.0, memory_source = "table" },
  { seq_len = "5M", status = "oom_device" },
]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "paper.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_committed_tables_can_be_read() -> None:
    """Every committed comparison speaks of a preset, a profile and a stack that exist, and its numbers have sources."""
    found = load_published(published_folder())

    assert found
    for one in found:
        assert one.model in PRESETS
        assert one.stack in STACKS
        assert load_hardware(one.profile).gpu == one.gpu
        assert all(method.values for method in one.methods)


def test_values_of_the_published_grid() -> None:
    """The published grid: 31 numbers and 3 cases out of memory, UPipe alone at 5M, three peaks in GiB."""
    (grid,) = [one for one in load_published(published_folder()) if one.arxiv == "2602.21196"]

    values = [value for method in grid.methods for value in method.values]
    assert sum(value.tokens_per_second_per_gpu is not None for value in values) == 31
    assert sum(value.status == "oom_device" for value in values) == 3
    assert [m.method for m in grid.methods if grid.value(m.method, 5 * 2**20)] == ["upipe"]
    found = grid.value("upipe", 3 * 2**20)
    assert found is not None
    assert found[1].peak_bytes == round(51.1 * GIB)
    assert sum(value.peak_bytes is not None for value in values) == 3


def test_a_good_file_is_read(tmp_path: Path) -> None:
    """Lengths are texts or numbers of tokens; what is not published is None."""
    found = read_published(written(tmp_path, GOOD))

    assert found.value("upipe", 131072) is not None
    assert found.value("upipe", 2**20) is None
    assert found.value("ring", 131072) is None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("format_version = 1", "format_version = 2", "format_version 2 is not 1"),
        ("peak_gib = 21.0", "peak_gb = 21.0", "did you mean 'peak_gib'"),
        ("2000.0", "-1.0", "greater than 0"),
        ("2000.0", "nan", "finite number"),
        ('"128K"', '"128Q"', "128Q"),
        ('"128K"', '"5M"', "upipe at 5242880"),
        ('source = "table"', 'source = "nowhere"', "no such source: nowhere"),
        (', memory_source = "table"', "", "belong together"),
        ("peak_gib = 21.0", "peak_gib = 21.0, parts_gib = { a = 1.0, b = 2.0 }", "add up to 3"),
        ('status = "oom_device"', 'status = "gone"', "oom_device"),
        ('status = "oom_device"', 'status = "ok"', "needs a number"),
        ("https://example.org/paper", "javascript:alert(1)", "sources.table.url"),
        ("2602.21196", "latest", "arxiv"),
        ("[[methods]]", "[[methods", "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    """A file with one mistake is refused with its name and the mistake."""
    path = written(tmp_path, GOOD.replace(old, new, 1))

    with pytest.raises(UsageError) as caught:
        load_published(tmp_path)

    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=200))
def test_no_text_does_more_than_be_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Whatever a file holds, it is read or refused in words."""
    path = written(tmp_path_factory.mktemp("any"), text)

    with pytest.raises(UsageError):
        read_published(path)


def test_a_folder_that_does_not_exist_holds_nothing(tmp_path: Path) -> None:
    """An installation without published results still makes reports."""
    assert load_published(tmp_path / "gone") == ()
