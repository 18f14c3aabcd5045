"""The report: records of any number of runs to one offline HTML page, PNG pictures and tables.

    load.py      files -> entries (a record and its run); what cannot be read is named and skipped
    checks.py    entries -> doubts: a loss that differs from the one of `single`, mixed sources
    series.py    entries -> panels of labelled series; nothing is ever joined over modes, machines or stacks
    tables.py    entries -> rows of cells, summary.md;  frame.py: entries -> records.csv, records.parquet
    baseline.py  two overviews -> rows of cells: the runs against a baseline
    published.py overview -> rows of cells, published.csv: the runs beside published results of the same cases
    plots.py     panels -> PNG (matplotlib);  charts.py: panels -> interactive charts (plotly)
    page.py      everything -> index.html

Records may come from elsewhere, so they are untrusted: text is escaped wherever it is shown and never becomes
a file name.  Importing this package is quick; pandas, matplotlib and plotly are imported when a report is
built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ReportResult", "build"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportResult:
    """What a report consists of."""

    page: Path
    """The HTML page; it needs no other file and no network."""
    pictures: tuple[Path, ...]
    """PNG files beside the page."""
    tables: tuple[Path, ...]
    """records.csv, records.parquet, published.csv (where a case is published) and summary.md beside the page."""
    skipped: tuple[str, ...]
    """One sentence for each record file that could not be read."""


def build(run_dirs: Sequence[Path], out: Path, baseline: Path | None = None) -> ReportResult:
    """Write the report of some runs into `out`; files of an older report there are replaced.

    Args:
        run_dirs: run folders (`<run>/cases/*.json`), or folders that hold records (`*.json`) themselves.
        out: folder of the report; made if needed.
        baseline: a run folder or folder of records to hold the runs against; it adds a section, and nothing to
            the charts and records.csv.

    Raises:
        RunFolderError: a folder does not exist or holds no readable record (then nothing is written), or
            `out` cannot be written.
    """
    from cpbench.report.page import write_report

    return write_report(run_dirs, out, baseline)
