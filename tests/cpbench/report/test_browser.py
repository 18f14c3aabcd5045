"""The page in a real browser: charts are drawn, nothing fails, nothing overflows, on a phone and on a screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cpbench.folders import published_folder
from cpbench.published import load_published
from cpbench.report.explanation import write_explanation
from cpbench.report.load import Entry, Loaded, RunFacts
from cpbench.report.page import render_page
from cpbench.report.published import beside_published
from cpbench.report.series import arrange
from tests.cpbench.report.examples import (
    long_records,
    make_case,
    make_explanation,
    mixed_records,
    troubled_records,
)

_BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(_BROWSER is None, reason="needs Chromium: apt-get install chromium"),
]

# Runs in the page once it is drawn and hands its findings to the page around it.
_PROBE = """
<script>
addEventListener("load", function () { setTimeout(function () {
  var root = document.documentElement, boxes = document.querySelectorAll(".plot"), heads;
  var sortable = document.querySelector("table.sortable"), column = 0;
  heads = sortable.querySelectorAll("th button");
  heads.forEach(function (head, index) { if (head.textContent === "Peak allocated") { column = index; } });
  heads[column].click();
  var sorted = Array.prototype.map.call(sortable.tBodies[0].rows, function (row) {
    return row.cells[column].dataset.sort === undefined ? "-" : Number(row.cells[column].dataset.sort); });
  document.querySelectorAll("button.log").forEach(function (button) { button.click(); });
  document.querySelectorAll(".legend button")[0].click();
  setTimeout(function () {
    var first = boxes[0];
    parent.postMessage(JSON.stringify({
      errors: root.dataset.errors || "", charts: root.dataset.charts, width: innerWidth,
      overflow: Math.max(root.scrollWidth, document.body.scrollWidth) - root.clientWidth,
      drawn: document.querySelectorAll(".js-plotly-plot .main-svg").length > 0
        && Array.prototype.every.call(boxes, function (box) { return box.querySelector(".main-svg"); }),
      narrow: Array.prototype.filter.call(boxes, function (box) {
        return box.querySelector(".main-svg").getBoundingClientRect().right > root.clientWidth; }).length,
      ink: first.layout.font.color, ground: getComputedStyle(document.body).backgroundColor,
      published: document.querySelectorAll("#published tbody tr").length,
      marked: document.querySelectorAll("#published td.bad").length,
      hidden: first.data.filter(function (trace) { return trace.visible === false; }).length,
      scale: first.layout.yaxis.type, sorted: sorted
    }), "*");
  }, 500);
}, 500); });
</script></body>"""
_PROBE_EXPLANATION = """
<script>
addEventListener("load", function () { setTimeout(function () {
  var root = document.documentElement, picture = document.querySelector("img");
  parent.postMessage(JSON.stringify({
    width: innerWidth, overflow: Math.max(root.scrollWidth, document.body.scrollWidth) - root.clientWidth,
    drawn: picture.naturalWidth > 0 && picture.getBoundingClientRect().right <= root.clientWidth,
    tables: document.querySelectorAll("table").length, foreign: document.querySelectorAll("b").length,
    rows: document.querySelectorAll("tr").length
  }), "*");
}, 100); });
</script></body>"""
_LISTEN = """<script>var found = {}; addEventListener("message", function (event) {
  var one = JSON.parse(event.data); found[one.width] = one;
  document.body.dataset.found = JSON.stringify(found); });</script>"""
_WIDTHS = (400, 1400)
_Facts = dict[str, object]
_Seen = dict[str, dict[str, _Facts]]  # by page and width


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("browser")
    records = {"troubled": troubled_records(), "long": long_records(), "mixed": mixed_records()}
    pages = {}
    for name, found in records.items():
        entries = tuple(Entry(run=name, record=record) for record in found)
        loaded = Loaded(entries=entries, runs=(RunFacts(name=name, records=len(entries)),), skipped=())
        pages[name] = folder / f"{name}.html"
        overview = arrange(entries)
        beside = beside_published(overview, load_published(published_folder()))
        page = render_page(overview, loaded, ["records.csv"], published=beside)
        pages[name].write_text(page, encoding="utf-8")
    return pages


def _dumped(page: Path, folder: Path, *flags: str) -> str:
    """The document after the page's scripts have run."""
    assert _BROWSER is not None
    command = [
        _BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        f"--user-data-dir={folder / 'profile'}",
        *flags,
        "--dump-dom",
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def _probed(page: Path, folder: Path, *flags: str, probe: str = _PROBE) -> dict[str, _Facts]:
    """What a script inside the page sees, in frames of exactly the widths of a phone and of a screen."""
    text = page.read_text(encoding="utf-8")
    # The page's policy lets no foreign script run, so the probed copy goes without it.
    text = re.sub(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", "", text)
    (folder / "probed.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    around = folder / "around.html"
    frames = "".join(
        f'<iframe src="probed.html" width="{width}" height="900" style="border:0"></iframe>'
        for width in _WIDTHS
    )
    around.write_text(f"<!DOCTYPE html><body>{_LISTEN}{frames}</body>", encoding="utf-8")
    found = re.search(r'data-found="([^"]*)"', _dumped(around, folder, *flags))
    assert found is not None, "the page's scripts did not run to their end"
    result: dict[str, _Facts] = json.loads(html.unescape(found[1]))
    return result


@pytest.fixture(scope="module")
def light(pages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> _Seen:
    """What was seen of each page at each width, in the light scheme."""
    return {name: _probed(page, tmp_path_factory.mktemp(name)) for name, page in pages.items()}


def test_charts_are_drawn_without_errors(pages: dict[str, Path], tmp_path: Path) -> None:
    """The page as it is, policy included: every chart is drawn, and no script failed or was refused."""
    document = _dumped(pages["troubled"], tmp_path)

    root = re.search(r"<html[^>]*>", document)
    assert root is not None
    assert "data-errors" not in root[0]
    assert 'data-charts="5"' in root[0]
    assert document.count("js-plotly-plot") >= 5
    assert "main-svg" in document


@pytest.mark.parametrize("width", _WIDTHS)
@pytest.mark.parametrize("name", ["troubled", "long", "mixed"])
def test_the_page_fits_its_window(light: _Seen, name: str, width: int) -> None:
    """On a phone and on a screen the body does not scroll sideways and every chart is inside; buttons work."""
    found = light[name][str(width)]

    assert found["errors"] == ""
    assert found["drawn"]
    assert found["overflow"] == 0
    assert found["narrow"] == 0
    assert found["scale"] == ("log" if name == "mixed" else "linear")  # the button has switched it
    assert found["hidden"] in (1, 2)  # the curve, and its marks where it has some


def test_the_table_sorts_by_value_with_missing_values_last(
    light: _Seen,
) -> None:
    """Selecting a heading orders the rows by their numbers."""
    rows = light["troubled"]["1400"]["sorted"]

    assert isinstance(rows, list)
    numbers = [row for row in rows if row != "-"]
    assert numbers == sorted(numbers)
    assert rows[len(numbers) :] == ["-"] * 4


def test_the_scheme_of_the_reader_is_followed(light: _Seen, pages: dict[str, Path], tmp_path: Path) -> None:
    """Dark ground comes with light ink, also in the charts, and the other way round."""
    bright = light["troubled"]["1400"]
    dark = _probed(pages["troubled"], tmp_path, "--blink-settings=preferredColorScheme=0")["1400"]

    assert (bright["ground"], bright["ink"]) == ("rgb(245, 246, 248)", "#1c2430")
    assert (dark["ground"], dark["ink"]) == ("rgb(17, 21, 27)", "#e6eaf0")


def test_published_values_are_shown_and_marked(light: _Seen) -> None:
    """The run of the published grid has a row for each published case, some with a mark; the others have no section."""
    found = light["long"]["1400"]

    assert found["published"] == 34
    assert isinstance(found["marked"], int)
    assert found["marked"] > 0
    assert light["mixed"]["1400"]["published"] == 0


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_of_an_explanation_fits_its_window(tmp_path: Path, count: int) -> None:
    """One case, or two side by side: the picture is there and inside, tables scroll on their own, text stays text."""
    explanations = [
        make_explanation(make_case(method, mode="estimate"), site=f"<b>{method}.py:1</b> {'x' * 200}")
        for method in ("ulysses", "upipe")[:count]
    ]
    page, _ = write_explanation(explanations, tmp_path)

    found = _probed(page, tmp_path, probe=_PROBE_EXPLANATION)

    for width in _WIDTHS:
        facts = found[str(width)]
        assert facts["drawn"]
        assert facts["overflow"] == 0
        assert facts["foreign"] == 0
        assert facts["tables"] == 3 * count + (count == 2)
