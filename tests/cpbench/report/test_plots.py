"""PNG files, and the pure functions that place marks in them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.record import Record
from cpbench.report.load import Entry
from cpbench.report.palette import METHOD_ORDER, category_colors, method_style
from cpbench.report.plots import thinned, write_pictures
from cpbench.report.quantities import LINES, MAX_PANELS, SPLITS, format_tick, log_ticks, shown_panels
from cpbench.report.series import Overview, arrange
from tests.cpbench.report.examples import (
    long_records,
    make_case,
    make_failure,
    make_record,
    mixed_records,
    smoke_records,
)

_NAMES = {
    "peak_memory.png",
    "throughput.png",
    "memory_by_category.png",
    "step_time_split.png",
    "attention_intermediates.png",
}
_HOSTILE = "_$\\frac{1$ \x00\x1b[31m</script> \U0001f4a5 " + "long " * 60


def _arranged(records: Sequence[Record]) -> Overview:
    return arrange([Entry(run="run", record=record) for record in records])


def _nothing_worked() -> list[Record]:
    return [make_failure(make_case("ring", seq_len=n), "error", "no") for n in (1024, 2048)]


def _hostile() -> list[Record]:
    names = {"model": _HOSTILE, "options": {_HOSTILE: _HOSTILE}}
    records = [make_record(make_case(method, **names)) for method in (_HOSTILE, "ring")]
    strange = make_record(make_case(_HOSTILE, seq_len=7), peak_by_category_bytes={_HOSTILE: 5, "": 9})
    return [*records, strange, make_failure(make_case(_HOSTILE, seq_len=10**15), "error", _HOSTILE)]


def _zeros() -> list[Record]:
    nothing = dict.fromkeys(("peak_allocated_bytes", "attention_intermediate_peak_bytes"), 0)
    return [make_record(make_case("ring"), peak_by_category_bytes={"other": 0}, step_seconds=0.0, **nothing)]


@pytest.mark.parametrize(
    "records",
    [long_records, mixed_records, _nothing_worked, _hostile, _zeros],
)
def test_every_picture_is_written(tmp_path: Path, records: Callable[[], list[Record]]) -> None:
    """All five pictures are readable PNGs of sane size, also when nothing worked or names are hostile."""
    pictures = write_pictures(_arranged(records()), tmp_path)

    assert _NAMES == {path.name for path in pictures} == {path.name for path in tmp_path.iterdir()}
    for path in pictures:
        raw = path.read_bytes()
        assert raw.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", raw[16:24])
        assert 800 < width < 2600
        assert 250 < height < 4000


def test_many_settings_do_not_make_an_endless_picture() -> None:
    """Panels beyond the limit are left to the tables, and a sentence says so."""
    records = [make_record(make_case("ring", batch_size=n)) for n in range(1, 41)]

    panels, note = shown_panels(_arranged(records))

    assert len(panels) == MAX_PANELS
    assert note == f"{40 - MAX_PANELS} more settings are in the table only."


def test_a_line_has_only_numbers_of_finished_cases() -> None:
    """A case without a number adds no zero: the values drawn are exactly the finished cases' values."""
    overview = _arranged(long_records())
    for line in LINES:
        for series in overview.panels[0].series:
            values = [line.value(point.record) for point in series.plotted]
            assert all(value is not None and value > 0 for value in values)


def test_segments_of_a_bar_add_up_to_the_peak() -> None:
    """No byte is lost between the record and the stacked bar, also in unknown categories."""
    odd = {"peak_by_category_bytes": {f"kind{i}": 2**i for i in range(20)}, "peak_allocated_bytes": 2**20 - 1}
    overview = _arranged([*smoke_records(), make_record(make_case("mine", seq_len=4096), **odd)])
    bars = SPLITS[0].bars(overview.panels[0])

    assert bars is not None
    for index, series in enumerate(bars.bars):
        total = sum(segment.values[index] for segment in bars.segments)
        assert total == series.plotted[-1].record.peak_allocated_bytes
    assert len(bars.segments) <= 12


@given(st.floats(1e-3, 1e12), st.floats(1.0, 1e9))
def test_log_ticks_enclose_the_numbers(low: float, factor: float) -> None:
    """A logarithmic axis never cuts a number off and never has a crowd of ticks."""
    ticks = log_ticks(low, low * factor)

    assert ticks[0] <= low * (1 + 1e-9)
    assert ticks[-1] >= low * factor * (1 - 1e-9)
    assert 1 < len(ticks) <= 16 or factor < 2


@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=60, unique=True).map(sorted))
def test_labels_of_lengths_keep_their_distance(lengths: list[int]) -> None:
    """At most as many labels as asked for (and the two ends), the longest always among them."""
    ticks = thinned(lengths, 8)

    assert ticks[-1] == lengths[-1]
    assert set(ticks) <= set(lengths)
    assert len(ticks) <= 9


def test_axis_numbers_have_no_needless_digits() -> None:
    """Ticks are read at a glance."""
    assert [format_tick(value) for value in (1e6, 20.0, 0.5)] == ["1,000,000", "20", "0.5"]


def test_methods_look_alike_everywhere() -> None:
    """Built-in methods have colours and markers of their own; a plug-in keeps the one of its name."""
    styles = [method_style(method) for method in METHOD_ORDER]

    assert len({color for color, _ in styles}) == len(styles) == len({marker for _, marker in styles})
    assert method_style("my-method") == method_style("my-method")
    assert len({method_style("ring", variant) for variant in range(4)}) == 4


def test_categories_keep_their_colour_whatever_else_is_shown() -> None:
    """Attention has one colour in every report."""
    alone = category_colors({"attention": 1.0}, 11)
    among = category_colors({"attention": 1.0, "mlp": 5.0, "strange": 2.0, "zero": 0.0}, 11)

    assert alone["attention"] == among["attention"]
    assert list(among) == ["attention", "mlp", "strange", "other"]
