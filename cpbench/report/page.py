"""Everything to one HTML page that needs no network and no other file, and the files beside it.

The page states its own content security policy: nothing may be loaded, and only the scripts written here
(named by their hashes) may run, so that even an escaping mistake could not make a foreign record run code.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench import __version__
from cpbench.errors import CpbenchError, RunFolderError
from cpbench.folders import published_folder
from cpbench.published import load_published
from cpbench.record import write_text_atomically
from cpbench.report import ReportResult
from cpbench.report.baseline import Comparison, compare
from cpbench.report.charts import ChartGroup, chart_groups
from cpbench.report.findings import findings, introduction
from cpbench.report.frame import write_frame
from cpbench.report.load import Loaded, load_runs
from cpbench.report.plots import write_pictures
from cpbench.report.published import BesidePublished, beside_published, published_csv
from cpbench.report.series import Overview, arrange
from cpbench.report.tables import (
    environment,
    failures,
    loss_note,
    notes,
    results_table,
    summary_markdown,
    warnings,
)

if TYPE_CHECKING:
    from jinja2 import Environment


def write_report(run_dirs: Sequence[Path], out: Path, baseline: Path | None = None) -> ReportResult:
    """Read the runs and write the report; see `cpbench.report.build`."""
    loaded = load_runs(run_dirs)
    overview = arrange(loaded.entries)
    comparison = None
    if baseline is not None:
        loaded, comparison = _against(baseline, loaded, overview)
    published = beside_published(overview, load_published(published_folder()))
    try:
        out.mkdir(parents=True, exist_ok=True)
        tables = (*write_frame(loaded.entries, out), *_write_published(published, out))
        summary = out / "summary.md"
        write_text_atomically(summary, summary_markdown(overview, loaded, comparison, published))
        pictures = write_pictures(overview, out)
        page = out / "index.html"
        beside = tuple(path.name for path in (*pictures, *tables, summary))
        write_text_atomically(page, render_page(overview, loaded, beside, comparison, published))
    except OSError as error:
        raise RunFolderError(
            f"report folder {out} cannot be written: {error.strerror or error}; choose another with --out"
        ) from error
    return ReportResult(page=page, pictures=pictures, tables=(*tables, summary), skipped=loaded.skipped)


def _write_published(found: BesidePublished | None, out: Path) -> tuple[Path, ...]:
    """Write published.csv, or take away the one of an older report."""
    path = out / "published.csv"
    if found is None:
        path.unlink(missing_ok=True)
        return ()
    write_text_atomically(path, published_csv(found))
    return (path,)


def _against(baseline: Path, loaded: Loaded, overview: Overview) -> tuple[Loaded, Comparison]:
    """Compare with the baseline; its skipped files join those of the runs."""
    found = load_runs([baseline])
    name = found.runs[0].name
    if name in {run.name for run in loaded.runs}:
        name = f"{baseline.resolve().parent.name}/{name}"
    skipped = (*loaded.skipped, *(f"baseline {problem}" for problem in found.skipped))
    return replace(loaded, skipped=skipped), compare(overview, arrange(found.entries), name)


def render_page(
    overview: Overview,
    loaded: Loaded,
    beside: Sequence[str],
    comparison: Comparison | None = None,
    published: BesidePublished | None = None,
) -> str:
    """Return the page as text.

    Args:
        overview: what to show.
        loaded: runs and skipped files.
        beside: names of the files that are written beside the page.
        comparison: with a baseline, if there is one.
        published: the cases that are published too, if there are any.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    templates = _templates()
    groups = chart_groups(overview)
    scripts = [
        _source(templates, "errors.js.jinja"),
        str(get_plotlyjs()),
        _source(templates, "page.js.jinja"),
    ]
    page: str = templates.get_template("page.html.jinja").render(
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        title=", ".join(run.name for run in loaded.runs),
        descriptions=[run.description for run in loaded.runs if run.description],
        overview=overview,
        introduction=introduction(overview),
        findings=findings(overview),
        groups=groups,
        table=results_table(overview),
        comparison=comparison,
        published=published,
        failures=failures(overview),
        notes=notes(overview),
        warnings=warnings(overview, loaded),
        loss_note=loss_note(overview),
        environment=environment(overview, loaded),
        skipped=loaded.skipped,
        beside=beside,
        style=Markup(_source(templates, "style.css.jinja")),
        scripts=[Markup(script) for script in scripts],
        data=Markup(json_for_script(_chart_data(groups))),
        policy=_policy(scripts),
    )
    return page


def json_for_script(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return JSON for the inside of a <script>: no text in it can end the element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 and U+2029 are escaped
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _chart_data(groups: Sequence[ChartGroup]) -> dict[str, Any]:
    charts = [chart for group in groups for chart in group.charts]
    return {chart.name: {"figure": chart.figure, "scales": chart.scales} for chart in charts}


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is fetched; plotly sets styles from code and draws its exported pictures from data URLs."""
    digests = [
        base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode() for script in scripts
    ]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # The wheel carries the templates inside the package; a checkout has them in reports/.
    bundled = Path(__file__).parent.parent / "_templates"
    folder = bundled if bundled.is_dir() else Path(__file__).parents[2] / "reports" / "templates"
    if not (folder / "page.html.jinja").is_file():
        raise CpbenchError(f"the report templates are missing from {folder}; reinstall cpbench")
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _source(templates: Environment, name: str) -> str:
    """The text of one of our own files; script hashes need it exactly as it stands in the page."""
    assert templates.loader is not None
    return templates.loader.get_source(templates, name)[0]
