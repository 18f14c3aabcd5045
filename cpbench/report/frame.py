"""Entries as a dataframe, and from it records.csv and records.parquet: one row a case, every number of it.

Unlike the page's table, nothing is left out.  A missing number is null in Parquet and an empty field in CSV.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.record import Record
from cpbench.report.checks import check_losses
from cpbench.report.load import Entry

if TYPE_CHECKING:
    import pandas as pd


def to_frame(entries: Sequence[Entry]) -> pd.DataFrame:
    """Return one row an entry; columns of a record's field have the same type in every report.

    Besides `Record.flat`, there are `run`, `loss_vs_single` (relative difference) and `loss_differs`.
    """
    rows = [
        entry.record.flat()
        | {"run": entry.run, "loss_vs_single": check.relative, "loss_differs": check.differs}
        for entry, check in zip(entries, check_losses(entries), strict=True)
    ]
    return typed_frame(rows)


def typed_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows of `Record.flat` as a dataframe: integers stay integers beside a missing value, which is null."""
    import pandas as pd

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, Any] = {}
    for name in names:
        kind: Any = _column_type(name)
        columns[name] = pd.array([row.get(name) for row in rows], dtype=kind)
    return pd.DataFrame(columns)


def write_frame(entries: Sequence[Entry], folder: Path) -> tuple[Path, Path]:
    """Write records.csv and records.parquet and return their paths."""
    frame = to_frame(entries)
    csv, parquet = folder / "records.csv", folder / "records.parquet"
    frame.to_parquet(parquet, index=False)
    shown = frame.copy()
    for name in shown.columns[shown.dtypes == "string"]:
        shown[name] = shown[name].map(harmless, na_action="ignore")
    shown.to_csv(csv, index=False)
    return csv, parquet


def harmless(text: str) -> str:
    """Return text of a foreign record so that no spreadsheet runs it as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _column_type(name: str) -> str:
    if name in Record.model_fields:
        return _FIELD_TYPES.get(_inner_type(Record.model_fields[name].annotation), "string")
    if name.endswith((".bytes", ".calls", ".rank")) or name == "num_params":
        return "Int64"
    if name.endswith((".min", ".mean")) or name == "loss_vs_single":
        return "Float64"
    return "boolean" if name == "loss_differs" else "string"


_FIELD_TYPES: dict[Any, str] = {int: "Int64", float: "Float64", bool: "boolean"}


def _inner_type(annotation: Any) -> Any:  # noqa: ANN401 - annotations have no common type
    """`int | None` -> int; `PositiveInt` -> int; anything else as it is."""
    if isinstance(annotation, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        annotation = members[0] if len(members) == 1 else annotation
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation
