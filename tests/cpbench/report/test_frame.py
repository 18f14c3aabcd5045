"""records.csv and records.parquet."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from cpbench.report.frame import to_frame, write_frame
from cpbench.report.load import Entry
from tests.cpbench.report.examples import make_case, make_failure, make_record, troubled_records


def _entries(*records: object) -> list[Entry]:
    return [Entry(run="run", record=record) for record in records]  # type: ignore[arg-type]


def test_parquet_keeps_types_and_nulls(tmp_path: Path) -> None:
    """Bytes stay integers beside a case without numbers, whose values are null."""
    entries = _entries(make_record(make_case("ring")), make_failure(make_case("upipe"), "oom_host", "no"))

    _, parquet = write_frame(entries, tmp_path)
    frame = pd.read_parquet(parquet, dtype_backend="numpy_nullable")

    assert frame["peak_allocated_bytes"].dtype == "Int64"
    assert frame["category.attention.bytes"].dtype == "Int64"
    assert frame["peak_allocated_bytes"].isna().tolist() == [False, True]
    assert frame["peak_allocated_bytes"][0] == entries[0].record.peak_allocated_bytes


@pytest.mark.parametrize(
    "name", ["mfu", "seq_len", "tile_mlp", "reason", "tokens_per_second", "loss_differs"]
)
def test_a_column_has_one_type_in_every_report(name: str) -> None:
    """A column of missing values has the type of a column with values."""
    full = to_frame(_entries(*troubled_records()))
    empty = to_frame(_entries(make_failure(make_case("ring"), "error", "no")))

    assert full[name].dtype == empty[name].dtype


def test_rows_say_their_run_and_the_verdict_on_their_loss() -> None:
    """What the report derived is in the files too."""
    frame = to_frame(_entries(*troubled_records()))

    assert frame["run"].unique().tolist() == ["run"]
    assert frame.loc[frame["loss_differs"], ["method", "seq_len"]].to_numpy().tolist() == [["ulysses", 2048]]


def test_csv_holds_no_formula(tmp_path: Path) -> None:
    """A spreadsheet does not run text of a foreign record; Parquet keeps it as it is."""
    formula = '=HYPERLINK("https://evil.example")'
    csv, parquet = write_frame(_entries(make_failure(make_case("ring"), "error", formula)), tmp_path)

    assert pd.read_csv(csv)["reason"].tolist() == ["'" + formula]
    assert pd.read_parquet(parquet)["reason"].tolist() == [formula]
