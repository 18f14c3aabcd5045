"""How many blocks may keep their attention output on the host."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.case import STACKS, Case
from cpbench.errors import Unsupported
from cpbench.host_budget import saved_attention_bytes, with_saved_attention
from cpbench.model_config import PRESETS

TIB = 2**40


def case(
    save_attention: int | str, budget: int | None = None, *, stack: str = "long", nodes: int = 1
) -> Case:
    changed = STACKS[stack].model_copy(update={"save_attention": save_attention, "host_budget_bytes": budget})
    return Case(
        method="ulysses",
        model="llama3-8b",
        architecture=PRESETS["llama3-8b"],
        seq_len=2**20,
        world_size=8,
        nodes=nodes,
        stack=changed,
    )


def test_an_attention_output_of_a_million_tokens_is_a_gibibyte_and_its_row_sums() -> None:
    """131072 tokens a rank, 4096 wide, two bytes; and 32 float32 log-sum-exps a token."""
    assert saved_attention_bytes(case(1)) == 2**30 + 131072 * 32 * 4


def test_auto_takes_what_the_budget_allows_beside_the_offloaded_inputs() -> None:
    """8B at 1M on 8 ranks keeps 32 GiB of inputs a rank; what is left holds outputs, three of them kept free."""
    each = saved_attention_bytes(case(1))
    inputs = 32 * 2**30

    assert with_saved_attention(case("auto", 8 * (inputs + 10 * each))).save_attention == 7
    assert with_saved_attention(case("auto", 8 * (inputs + 10 * each) - 1)).save_attention == 6
    assert with_saved_attention(case("auto", 8 * inputs)).save_attention == 0
    assert with_saved_attention(case("auto", 4 * (inputs + 10 * each), nodes=2)).save_attention == 7
    assert with_saved_attention(case("auto", 100 * TIB)).save_attention == 32


@given(budget=st.integers(1, 8 * TIB))
def test_what_auto_keeps_stays_in_the_budget(budget: int) -> None:
    """Whatever the budget, inputs and kept outputs of all ranks of the node fit it, unless nothing is kept."""
    kept = with_saved_attention(case("auto", budget)).save_attention
    assert isinstance(kept, int)
    assert kept == 0 or 8 * (32 * 2**30 + kept * saved_attention_bytes(case(1))) <= budget


@pytest.mark.parametrize(
    ("wanted", "stack", "message"),
    [(1, "plain", "checkpoint"), ("auto", "long", "host_budget_bytes"), (33, "long", "32 layers")],
)
def test_what_cannot_be_saved_is_unsupported(wanted: int | str, stack: str, message: str) -> None:
    """The reason names what is missing and what to do."""
    with pytest.raises(Unsupported, match=message):
        with_saved_attention(case(wanted, stack=stack))
