"""In bfloat16 errors are judged over several inputs, and a fault that one of them shows is found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpbench import registry
from cpbench.case import Dtype
from cpbench.parity import rank as rank_module
from cpbench.parity.block import Block
from cpbench.parity.rank import DRAWS, ParityRank
from cpbench.parity.ranks import Ranks
from cpbench.parity.reference import make_inputs, reference_block, relative_error
from cpbench.resolve import resolve
from cpbench.selection import Selection
from cpbench.shape import Shape
from cpbench.verification import Verification
from cpbench.verify import VerifyRequest

CPU = torch.device("cpu")
# A block needs no mesh: that is for training.
ALONE = Ranks(rank=0, size=1, mesh=None, device=CPU)  # type: ignore[arg-type]
SOMETIMES_WRONG = '''
"""Single whose output is off by a tenth, but not for one input."""
from dataclasses import dataclass

from methods.single import Single


@dataclass(frozen=True, kw_only=True)
class Sometimes(Single):
    def attention(self, x, weights, ctx):
        out = Single.attention(self, x, weights, ctx)
        return out if float(x.detach().flatten()[0]) == {spared} else out * 1.1


METHOD = Sometimes
'''


def case_of(method: str = "single", dtype: Dtype = "bfloat16", *plugins: Path) -> Any:  # noqa: ANN401 - a Case
    shape = Shape(world_size=1, seq_len=24, num_heads=2, num_kv_heads=1, dtype=dtype)
    request = VerifyRequest(methods=(method,), selection=Selection(shapes=(shape,)), plugins=plugins)
    (item,) = request.items()
    case, unsupported = resolve(item.case.model_copy(update={"world_size": 1}), list(plugins))
    assert unsupported is None
    return case


def verified(method: str, *plugins: Path) -> Verification:
    case = case_of(method, "bfloat16", *plugins)
    return ParityRank(case, plugins, ALONE, ALONE).verify(case, (), None)


def test_draws_differ_and_are_repeatable() -> None:
    """Every input of every draw is another; the same draw is the same, and the first is that of no draw."""
    draws = [make_inputs(case_of(), CPU, draw) for draw in range(DRAWS)]

    for name, first in draws[0].items():
        assert torch.equal(first, make_inputs(case_of(), CPU)[name])
        assert torch.equal(draws[1][name], make_inputs(case_of(), CPU, 1)[name])
        for a in range(DRAWS):
            for b in range(a):
                assert not torch.equal(draws[a][name], draws[b][name]), (name, a, b)


@pytest.mark.parametrize(("dtype", "count"), [("float32", 1), ("bfloat16", 4)])
def test_an_error_is_the_root_mean_square_over_the_draws(dtype: Dtype, count: int) -> None:
    """Each quantity's is worked out here from the draws' errors; float32, which has a hard limit, draws once."""
    case = case_of("single", dtype)
    block = Block(case, registry.load("single", {}), ALONE)
    rank = ParityRank(case, (), ALONE, ALONE)
    errors: list[Mapping[str, float]] = []
    for draw in range(count):
        inputs = make_inputs(case, CPU, draw)
        ours: dict[str, Tensor] = block.run(inputs).tensors
        errors.append(
            {n: relative_error(ours[n], wanted) for n, wanted in reference_block(case, inputs).items()}
        )

    run, found = rank._compared(block, "plain")

    assert set(found) == {"out", "dx", "dwq", "dwk", "dwv", "dwo"}
    for name, error in found.items():
        drawn = [each[name] for each in errors]
        assert error == pytest.approx(math.sqrt(sum(e**2 for e in drawn) / count), rel=1e-12)
        assert len(set(drawn)) == count
    assert torch.equal(run.tensors["out"], block.run(make_inputs(case, CPU)).tensors["out"])


@pytest.mark.parametrize("spared", range(DRAWS))
def test_a_fault_that_not_every_draw_shows_is_found(spared: int, tmp_path: Path) -> None:
    """A method that is right for one input only fails, whichever that is; `single` at the same shape passes."""
    first = float(make_inputs(case_of(), CPU, spared)["x"].flatten()[0])
    plugin = tmp_path / "sometimes.py"
    plugin.write_text(SOMETIMES_WRONG.format(spared=first), encoding="utf-8")

    assert verified("single").verdict == "pass"
    found = verified("sometimes", plugin)

    assert found.verdict == "fail"
    assert {"out", "dx", "out (checkpoint)"} <= {c.name for c in found.checks if not c.passed}


def test_one_draw_would_miss_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first input alone, the method that is right there passes: the others are what finds it."""
    monkeypatch.setattr(rank_module, "DRAWS", 1)
    first = float(make_inputs(case_of(), CPU)["x"].flatten()[0])
    plugin = tmp_path / "sometimes.py"
    plugin.write_text(SOMETIMES_WRONG.format(spared=first), encoding="utf-8")

    assert verified("sometimes", plugin).verdict == "pass"
