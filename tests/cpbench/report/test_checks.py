"""Losses held against `single`."""

from __future__ import annotations

import pytest

from cpbench.record import Record
from cpbench.report.checks import check_losses, mixed_sources
from cpbench.report.load import Entry
from tests.cpbench.report.examples import make_case, make_record


def _entries(*records: Record) -> list[Entry]:
    return [Entry(run="run", record=record) for record in records]


def _with_loss(method: str, loss: float, **case: object) -> Record:
    return make_record(make_case(method, **case), losses=(loss,))


@pytest.mark.parametrize(
    ("dtype", "loss", "differs"),
    [
        ("float32", 5.0 * (1 + 0.9e-4), False),
        ("float32", 5.0 * (1 + 1.1e-4), True),
        ("bfloat16", 5.0 * (1 - 1.9e-2), False),
        ("bfloat16", 5.0 * (1 - 2.1e-2), True),
    ],
)
def test_the_tolerance_depends_on_the_dtype(dtype: str, loss: float, differs: bool) -> None:
    """1e-4 relative in float32 and 2e-2 in bfloat16, in either direction."""
    entries = _entries(_with_loss("single", 5.0, dtype=dtype), _with_loss("ring", loss, dtype=dtype))

    assert [False, differs] == [check.differs for check in check_losses(entries)]


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 2048},
        {"dtype": "bfloat16"},
        {"seed": 1},
        {"batch_size": 2},
        {"model": "other"},
        {"mode": "emulate"},
    ],
)
def test_only_the_same_question_is_compared(change: dict[str, object]) -> None:
    """A reference at another length, dtype, seed, batch, model or mode is no reference."""
    entries = _entries(_with_loss("single", 5.0), _with_loss("ring", 9.0, **change))

    assert check_losses(entries)[1].relative is None


def test_different_numbers_of_steps_are_compared_at_the_last_common_step() -> None:
    """A longer run is held against the reference where both have a loss."""
    reference = make_record(make_case("single"), losses=(7.0, 6.0))
    longer = make_record(make_case("ring", steps=9), losses=(7.0, 6.0, 5.0, 4.0))

    assert check_losses(_entries(reference, longer))[1].relative == 0.0


def test_a_changed_source_of_a_method_is_told() -> None:
    """A resumed run whose method was edited in between mixes two methods under one name."""
    records = [
        make_record(make_case("ring", seq_len=n), method_source_hash=h) for n, h in ((1, "aaa"), (2, "bbb"))
    ]

    assert mixed_sources(_entries(*records)) == [
        "run run: the source of method ring changed between its cases (aaa, bbb)"
    ]
