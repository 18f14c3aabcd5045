"""The whole report: files, page, and what a hostile record cannot do to it."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cpbench.errors import RunFolderError
from cpbench.report import ReportResult, build
from cpbench.report.load import Entry, Loaded, RunFacts
from cpbench.report.page import json_for_script, render_page
from cpbench.report.series import arrange
from tests.cpbench.report.examples import (
    make_case,
    make_failure,
    make_record,
    mixed_records,
    smoke_records,
    troubled_records,
    write_run,
)

_VOID = {"meta", "link", "br", "img", "hr", "input", "line", "rect", "path", "circle"}


class _Page(HTMLParser):
    """Collects elements and text, and fails on elements that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not (self.open and self.open[-1] == "style"):
            self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ReportResult:
    folder = tmp_path_factory.mktemp("report")
    run = write_run(folder / "runs" / "troubled", troubled_records(), command=["cpbench", "sweep"])
    (run / "cases" / "newer.json").write_text('{"format_version": 999}')
    (run / "cases" / "cut.json").write_text('{"format_version": 1, "ca')
    return build([run], folder / "out")


def _rendered(records: list[object], **facts: object) -> str:
    entries = tuple(Entry(run="run", record=record) for record in records)  # type: ignore[arg-type]
    runs = (RunFacts(name="run", records=len(entries), **facts),)  # type: ignore[arg-type]
    return render_page(arrange(entries), Loaded(entries=entries, runs=runs, skipped=()), ["records.csv"])


def test_the_report_has_a_page_pictures_and_tables(report: ReportResult) -> None:
    """All files named by the result exist in the folder that was asked for, and no others."""
    files = {report.page, *report.pictures, *report.tables}

    assert files == set(report.page.parent.iterdir())
    assert report.page.name == "index.html"
    assert len(report.pictures) == 5
    assert {path.name for path in report.tables} == {"records.csv", "records.parquet", "summary.md"}


def test_skipped_files_are_named_in_result_and_page(report: ReportResult) -> None:
    """A newer and a truncated record cost nothing but a sentence each."""
    text = _Page(report.page.read_text(encoding="utf-8")).text

    assert len(report.skipped) == 2
    for name in ("newer.json", "cut.json"):
        assert any(name in sentence for sentence in report.skipped)
        assert name in text


def test_the_page_loads_nothing(report: ReportResult) -> None:
    """No element points to the network, and the page forbids itself to fetch anything."""
    page = _Page(report.page.read_text(encoding="utf-8"))

    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            address = attributes.get(name) or ""
            assert ":" not in address.replace("data:,", ""), (tag, address)
            assert not address.startswith("//")
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert "default-src 'none'" in str(policies[0])
    assert "url(" not in report.page.read_text(encoding="utf-8").split("</style>")[0]
    assert not any(tag in ("img", "iframe", "object", "embed") for tag, _ in page.elements)


def test_plotly_is_inlined_once(report: ReportResult) -> None:
    """The page carries the library itself, one time."""
    page = _Page(report.page.read_text(encoding="utf-8"))

    assert sum("plotly.js v" in script[:400] for script in page.scripts) == 1
    assert report.page.stat().st_size < 6_500_000


def test_the_page_shows_results_failures_and_environment(report: ReportResult) -> None:
    """Reasons, warnings, command, versions and definitions are readable as text."""
    text = " ".join(_Page(report.page.read_text(encoding="utf-8")).text.split())

    for words in (
        "upipe: stage_heads=3 does not fit",
        "no end after 1800 s",
        "loss 5.5 differs from the one of single",
        "first loss 9.120 is far",
        "cpbench sweep",
        "Intel Xeon Processor @ 2.60GHz",
        "recomputation is not counted",
        "measured on cpu-2x-intel-xeon-processor",
        "naturally larger",
    ):
        assert words in text


def test_every_mode_is_labelled_on_the_page() -> None:
    """A page with three modes says them in the introduction, the legends and the table."""
    page = _Page(_rendered(list(mixed_records())))

    for words in ("ring (estimated for h100-80g)", "ring (emulated on 8x-h100-80gb-hbm3)"):
        assert page.text.count(words) >= 6
    assert "Estimated: nothing was run" in page.text


_ATTACKS = (
    "<script>document.documentElement.dataset.errors='pwned'</script>",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!--<script>",
    "{{ 7*7 }}{% raw %}",
    "\u2028\u2029\u202e",
    "javascript:alert(1)",
)


@pytest.mark.parametrize("attack", _ATTACKS)
def test_hostile_text_stays_text(attack: str) -> None:
    """Whatever field of a record or run.json it is in, text becomes neither an element nor a script."""
    names = {"model": attack, "options": {attack: attack}}
    machine = make_record(make_case("ring")).machine
    assert machine is not None
    evil_machine = machine.model_copy(update={"name": attack, "cpu": attack, "os": attack})
    strange = {"warnings": (attack,), "peak_by_category_bytes": {attack: 10**6}, "git_commit": attack}
    records = [
        make_record(make_case(attack, **names), evil_machine, **strange),
        make_failure(make_case("ring", seq_len=3), "error", f"{attack}\n{attack}", evil_machine),
    ]
    harmless = _Page(
        _rendered(
            [make_record(make_case("ring")), make_failure(make_case("ring", seq_len=3), "error", "x\ny")]
        )
    )

    page = _Page(
        _rendered(records, command=attack, scenario=attack, description=attack, versions=((attack, attack),))
    )

    assert len(page.scripts) == len(harmless.scripts) == 4
    assert [tag for tag, _ in page.elements if tag in ("script", "img")] == ["script"] * 4
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    shown = json.dumps(json.loads(page.scripts[1]))
    assert "<" not in page.scripts[1]
    assert "<script" not in shown
    if attack.strip() and attack[0] != "\u2028":
        assert attack in page.text


def test_json_in_a_script_cannot_end_it() -> None:
    """The text is still the same JSON, without any character that HTML gives a meaning to."""
    value = {"</script>": ["<!--", "\u2028", "&lt;", "]]>"]}

    text = json_for_script(value)

    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028")


def test_file_names_never_come_from_records(tmp_path: Path) -> None:
    """A method named like a path writes nothing outside the report."""
    record = make_record(make_case("../../evil"))
    run = write_run(tmp_path / "run", [])
    (run / "cases" / "x.json").write_text(record.model_dump_json())

    build([run], tmp_path / "out")

    assert not list(tmp_path.rglob("*evil*"))


def test_nothing_is_written_for_a_missing_run(tmp_path: Path) -> None:
    """A report of one good and one missing run is refused before its folder is made."""
    run = write_run(tmp_path / "run", smoke_records())

    with pytest.raises(RunFolderError, match="does not exist"):
        build([run, tmp_path / "gone"], tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_refused_by_name(tmp_path: Path) -> None:
    """A file in the place of the report folder gives a message that names it."""
    run = write_run(tmp_path / "run", smoke_records()[:1])
    (tmp_path / "out").write_text("")

    with pytest.raises(RunFolderError, match=r"out cannot be written.*choose another"):
        build([run], tmp_path / "out")


def test_importing_the_report_is_quick() -> None:
    """Neither plotting nor dataframes nor torch are imported before a report is built."""
    code = "import sys, cpbench.report; print([m for m in ('torch','pandas','plotly','jinja2') if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    """Building a page works where torch cannot be imported."""
    run = write_run(tmp_path / "run", smoke_records()[:2])
    code = (
        "import sys, pathlib; sys.modules['torch'] = None\n"
        "from cpbench.report import build\n"
        f"build([pathlib.Path({str(run)!r})], pathlib.Path({str(tmp_path / 'out')!r}))"
    )

    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    assert (tmp_path / "out" / "index.html").is_file()
