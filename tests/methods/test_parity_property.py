"""Any shape on one rank, where a method's schedule of heads and chunks runs without neighbours, and its biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpbench import registry
from cpbench.case import STACKS, Case, OptionValue
from cpbench.parity.rank import ParityRank
from cpbench.parity.ranks import Ranks
from cpbench.runtime.projection import Projection, project
from cpbench.shape import Shape
from cpbench.verification import Verification

SETS = [
    (name, options)
    for name, path in registry.method_files().items()
    for options in registry.verify_options(path)
]


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A process group of one rank in this process."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch.distributed has no __all__
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# In float32 only: the limit of bfloat16 is a ratio of two errors, which says nothing over a handful of numbers.
@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv, ratio = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    return Shape(
        world_size=1,
        num_heads=kv * ratio,
        num_kv_heads=kv,
        head_dim=2 * draw(st.integers(1, 40)),
        seq_len=draw(st.integers(2, 70)),
        batch_size=draw(st.integers(1, 3)),
        qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        hidden_dim=draw(st.integers(1, 48)) + 24,
    )


def check(shape: Shape, method: str, options: dict[str, OptionValue]) -> Verification:
    loaded = registry.load(method, options)
    case = Case(
        method=method,
        options=registry.resolved_options(loaded),
        model="verify",
        architecture=shape.architecture(),
        seq_len=shape.seq_len,
        batch_size=shape.batch_size,
        world_size=1,
        dtype=shape.dtype,
        stack=STACKS["long"],
    )
    everyone, one = Ranks.make(torch.device("cpu"))
    return ParityRank(case, [], everyone, one).verify(case, (), None)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes(), chosen=st.sampled_from(SETS))
def test_any_shape_equals_the_reference(shape: Shape, chosen: tuple[str, dict[str, OptionValue]]) -> None:
    """Output, gradients, recomputation, causality and head order, of any method and option set at any shape."""
    result = check(shape, *chosen)

    assert result.verdict in ("pass", "unsupported"), (chosen, result.reason)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes(), data=st.data())
def test_any_stage_size_equals_the_reference(shape: Shape, data: st.DataObject) -> None:
    """UPipe with every divisor of the heads as its stage."""
    divisors = [n for n in range(1, shape.num_heads + 1) if shape.num_heads % n == 0]

    result = check(shape, "upipe", {"stage_heads": data.draw(st.sampled_from(divisors))})

    assert result.verdict == "pass", result.reason


OWN_PROJECTIONS: tuple[tuple[str, dict[str, OptionValue]], ...] = (
    ("single", {}),
    ("fpdt", {"chunk_tokens": 13}),
    ("upipe", {}),
    ("upipe", {"published": True}),
)
"""Every way to project in the tree."""
BIASED = Shape(world_size=1, num_heads=8, num_kv_heads=4, seq_len=26, attention_bias=True)


@pytest.mark.parametrize(("method", "options"), OWN_PROJECTIONS, ids=str)
def test_a_gradient_of_a_bias_that_leaves_out_a_token_is_found(
    monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, OptionValue]
) -> None:
    """The twin: it shows in the gradients of all three biases, and in no other."""
    monkeypatch.setattr("cpbench.runtime.projection._bias_gradient", lambda grad: grad[:-1].sum(0))

    result = check(BIASED, method, options)

    failed = {check.name for check in result.checks if not check.passed}
    assert {name.split()[0] for name in failed} == {"dbq", "dbk", "dbv"}
    assert {"dbq", "dbk (checkpoint)", "dbv (attention saved)"} <= failed


@pytest.mark.parametrize(("method", "options"), OWN_PROJECTIONS, ids=str)
def test_a_bias_that_is_not_added_is_found(
    monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, OptionValue]
) -> None:
    """The twin: the output and the gradients of the weights show it, too."""

    def without(x: Tensor, projection: Projection, head_dim: int) -> Tensor:
        return project(x, replace(projection, bias=None), head_dim)

    for module in ("cpbench.runtime.attention_block", "methods.fpdt", "methods.upipe"):
        monkeypatch.setattr(f"{module}.project", without)

    result = check(BIASED, method, options)

    assert {"out", "dwq", "dwk", "dwo"} <= {check.name for check in result.checks if not check.passed}
