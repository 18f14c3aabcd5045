"""Cases: their ids, their presets, what they refuse."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cpbench.case import STACKS, Case, stack_by_name
from cpbench.errors import UnknownName
from cpbench.model_config import PRESETS
from tests.cpbench.workers.harness import ROOT, fake_case

CHANGES: dict[str, Any] = {
    "method": "ring",
    "options": {"act": "ok", "more": 1},
    "model": "other",
    "architecture": PRESETS["llama3-8b"],
    "seq_len": 2048,
    "batch_size": 2,
    "world_size": 4,
    "nodes": 2,
    "ulysses_degree": 2,
    "ring_degree": 2,
    "dtype": "bfloat16",
    "stack": STACKS["plain"],
    "attention_backend": "cpu-flash",
    "mode": "estimate",
    "device": "cuda",
    "hardware": "h200",
    "host_memory_bytes": 2**40,
    "steps": 7,
    "warmup": 1,
    "seed": 1,
    "rank": 1,
    "model_layers": 9,
}


@pytest.mark.parametrize("field", sorted(Case.model_fields))
def test_every_field_is_part_of_the_id(field: str) -> None:
    """Two cases that differ in anything have different ids, so a resumed run never takes one for the other."""
    case = fake_case("ok")
    assert case.case_id != case.model_copy(update={field: CHANGES[field]}).case_id


def test_fields_that_came_later_leave_older_ids_alone() -> None:
    """A case that uses none of the later fields has the id that it had before there were any."""
    case = fake_case("ok")
    before = case.model_dump(mode="json", exclude={"rank", "model_layers", "host_memory_bytes"})
    digest = hashlib.sha256(json.dumps(before, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert case.case_id.endswith(digest[:12])


def test_the_id_is_the_same_in_another_process() -> None:
    """The id does not depend on hash seeds or the order of options."""
    case = fake_case("ok").model_copy(update={"options": {"b": 1, "a": 2.5}})
    code = "import sys; from cpbench.case import Case; print(Case.model_validate_json(sys.argv[1]).case_id)"
    swapped = case.model_copy(update={"options": {"a": 2.5, "b": 1}})
    command = [sys.executable, "-c", code, swapped.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == case.case_id


@given(
    seq_len=st.integers(1, 2**24),
    world_size=st.integers(1, 64),
    options=st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.booleans()
        | st.integers(-9, 2**60)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=9),
        max_size=4,
    ),
)
def test_a_case_survives_json(seq_len: int, world_size: int, options: dict[str, Any]) -> None:
    """What crosses the process border comes back equal, with the types of option values and the id."""
    case = fake_case("ok").model_copy(
        update={"seq_len": seq_len, "world_size": world_size, "options": options}
    )
    back = Case.model_validate_json(case.model_dump_json())
    assert back == case
    assert back.case_id == case.case_id
    assert [type(value) for value in back.options.values()] == [type(value) for value in options.values()]


def test_the_id_is_a_file_name() -> None:
    """The id starts with method and length and holds nothing that a path would trip over."""
    case = fake_case("ok").model_copy(update={"method": "a/b..c d", "seq_len": 2621440})
    assert case.case_id.startswith("a-b--c-d-2_5M-")


@pytest.mark.parametrize(
    "change",
    [{"seq_len": 0}, {"world_size": 0}, {"world_size": -1}, {"dtype": "int8"}, {"steps": 0}, {"typo": 1}],
)
def test_impossible_cases_are_refused(change: dict[str, Any]) -> None:
    """Counts start at one and unknown keys are errors."""
    with pytest.raises(ValidationError):
        Case.model_validate(fake_case("ok").model_dump() | change)


def test_an_unknown_stack_offers_the_nearest() -> None:
    """A misspelt preset is refused with the right spelling."""
    with pytest.raises(UnknownName, match="did you mean 'long'"):
        stack_by_name("lng")
