"""Interactive charts as plain plotly figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import pytest

from cpbench.record import Record
from cpbench.report.charts import ChartGroup, chart_groups
from cpbench.report.load import Entry
from cpbench.report.series import arrange
from tests.cpbench.report.examples import (
    long_records,
    make_case,
    make_failure,
    make_record,
    mixed_records,
    smoke_records,
    troubled_records,
)


def _groups(records: Sequence[Record]) -> dict[str, ChartGroup]:
    overview = arrange([Entry(run="run", record=record) for record in records])
    return {group.name: group for group in chart_groups(overview)}


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


@pytest.mark.parametrize("records", [smoke_records, long_records, mixed_records, troubled_records])
def test_figures_are_valid(records: Callable[[], list[Record]]) -> None:
    """Plotly knows every property that the charts use, on either scale."""
    import plotly.graph_objects as go

    for group in _groups(records()).values():
        assert group.charts
        for chart in group.charts:
            go.Figure(chart.figure)
            for scale in (chart.scales or {}).values():
                go.Figure(layout={"yaxis": scale})
            json.dumps(chart.figure, allow_nan=False)


def test_a_chart_for_every_question() -> None:
    """The page asks the same questions as the pictures."""
    assert list(_groups(smoke_records())) == [
        "peak_memory",
        "throughput",
        "memory_by_category",
        "step_time_split",
        "attention_intermediates",
    ]


def test_cases_without_numbers_are_in_the_strip_and_not_on_the_curve() -> None:
    """An x stands at the length in an axis of its own, with the outcome in words and the reason on hover."""
    (chart,) = _groups(troubled_records())["peak_memory"].charts
    marks = [trace for trace in chart.figure["data"] if trace.get("yaxis") == "y2"]
    curves = [trace for trace in chart.figure["data"] if trace.get("yaxis") != "y2"]

    upipe = next(trace for trace in marks if trace["name"].startswith("upipe"))
    assert upipe["x"] == [1024, 2048, 4096]
    assert [text.strip() for text in upipe["text"]] == ["unsup.", "error", "invalid"]
    assert "stage_heads=3 does not fit" in upipe["hovertext"][0]
    assert next(trace for trace in curves if trace["name"].startswith("upipe"))["x"] == []


def test_hover_says_value_length_ranks_and_mode() -> None:
    """A reader of one point needs no other part of the page."""
    (chart,) = _groups(smoke_records())["peak_memory"].charts
    text = chart.figure["data"][1]["hovertext"][0]

    assert "ring (4 ranks)" in text
    assert "1K tokens, 4 ranks" in text
    assert "MiB" in text
    assert "mean over ranks" in text
    assert "measured on cpu-2x-intel-xeon-processor" in text


def test_a_wide_range_starts_on_a_log_axis_that_says_so() -> None:
    """Numbers a factor of 5 apart are not squeezed together; the other scale stays at hand."""
    groups = _groups(smoke_records())
    memory, throughput = groups["peak_memory"].charts[0], groups["throughput"].charts[0]

    assert memory.log
    assert memory.figure["layout"]["yaxis"]["title"]["text"] == "Peak allocated (MiB, log scale)"
    assert not throughput.log
    assert throughput.figure["layout"]["yaxis"]["range"][0] == 0


def test_text_of_records_is_no_markup_and_no_template() -> None:
    """Names and reasons appear as they are: no tag of plotly's, no link, no template."""
    hostile = '<a href="javascript:x()">%{x}</a>'
    names = {"model": hostile, "options": {hostile: hostile}}
    records = [
        make_record(make_case(hostile, **names)),
        make_failure(make_case("ring", seq_len=9), "error", hostile),
    ]

    for group in _groups(records).values():
        for chart in group.charts:
            texts = list(_texts(chart.figure))
            assert not any("<a" in text for text in texts)
            assert "hovertemplate" not in json.dumps(chart.figure)
            assert "texttemplate" not in json.dumps(chart.figure)
