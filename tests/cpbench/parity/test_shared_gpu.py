"""Ranks that share a GPU, here on CPU tensors: what each collective gives, what it counts, and verdicts over it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cpbench.launch import child_environment
from cpbench.resolve import resolve
from cpbench.selection import Selection
from cpbench.shape import Shape
from cpbench.verification import Verification
from cpbench.verify import VerifyRequest
from tests.cpbench.torchrun import run_ranks
from tests.cpbench.workers.harness import ROOT

pytestmark = pytest.mark.slow

WORKER = ROOT / "tests" / "cpbench" / "workers" / "shared_gpu_rank.py"
BROKEN = {
    name: ROOT / "tests" / "methods" / "broken" / f"{name.replace('-', '_')}.py"
    for name in ("broken-ring", "broken-replicas")
}
RANKS = range(4)
STACKS = ("long",)

# What each rank has after an exchange; ranks put in [r, 10 r] where nothing else is said.
VALUES: dict[str, list[Any]] = {
    "all_reduce_sum": [[6, 60]] * 4,
    "all_reduce_average": [[1.5, 15.0]] * 4,
    "all_reduce_max": [[3, 30]] * 4,
    "all_reduce_min": [[1, 1]] * 4,
    "all_reduce_of_a_view": [[6, -1, 60, -1]] * 4,
    "all_reduce_bfloat16": [[6, 60]] * 4,
    "all_reduce_in_a_pair": [[2, 20], [4, 40], [2, 20], [4, 40]],
    "reduce_to_two": [[0, 0], [1, 10], [6, 60], [3, 30]],
    "broadcast_from_one": [[1, 10]] * 4,
    "broadcast_in_a_pair": [[2, 20], [3, 30], [2, 20], [3, 30]],
    "all_gather": [[[0, 0], [1, 10], [2, 20], [3, 30]]] * 4,
    "all_gather_into_tensor": [[0, 0, 1, 10, 2, 20, 3, 30]] * 4,
    "all_gather_in_a_pair": [[0, 0, 2, 20], [1, 10, 3, 30], [0, 0, 2, 20], [1, 10, 3, 30]],
    "all_gather_object": [[{"rank": r, "words": "x" * r} for r in RANKS]] * 4,
    "reduce_scatter_sum": [[60, 0], [64, -4], [68, -8], [72, -12]],
    "reduce_scatter_average": [[15], [16], [17], [18]],
    "all_to_all_equal": [[0, 10, 20, 30], [1, 11, 21, 31], [2, 12, 22, 32], [3, 13, 23, 33]],
    # From rank s to rank t, (s + 2 t) mod 4 rows of [s, t].
    "all_to_all_unequal": [
        [[1, 0], [2, 0], [2, 0], [3, 0], [3, 0], [3, 0]],
        [[0, 1], [0, 1], [1, 1], [1, 1], [1, 1], [3, 1]],
        [[1, 2], [2, 2], [2, 2], [3, 2], [3, 2], [3, 2]],
        [[0, 3], [0, 3], [1, 3], [1, 3], [1, 3], [3, 3]],
    ],
    "ring": [[[3, 30], [103]], [[0, 0], [100]], [[1, 10], [101]], [[2, 20], [102]]],
    "ring_of_a_pair": [[[2, 20]], [[3, 30]], [[0, 0]], [[1, 10]]],
    "barrier": [True] * 4,
    "functional_gather": [[[0, 1, 2, 3], [0, 10, 20, 30]]] * 4,
    "functional_permute": [[3, 30], [0, 0], [1, 10], [2, 20]],
    "functional_sum": [[2, 20], [4, 40], [2, 20], [4, 40]],
}
# Bytes that each rank sends to others, by the rules of `cpbench.runtime.collectives`; two int64 are 16.
SENT: dict[str, list[dict[str, int]]] = {
    "all_reduce_sum": [{"all_reduce": 24}] * 4,  # 2 x 16 x 3/4
    "all_reduce_average": [{"all_reduce": 12}] * 4,
    "all_reduce_max": [{"all_reduce": 6}] * 4,
    "all_reduce_min": [{"all_reduce": 12}] * 4,
    "all_reduce_of_a_view": [{"all_reduce": 12}] * 4,
    "all_reduce_bfloat16": [{"all_reduce": 6}] * 4,
    "all_reduce_in_a_pair": [{"all_reduce": 16}] * 4,  # 2 x 16 x 1/2
    "reduce_to_two": [{}] * 4,
    "broadcast_from_one": [{}, {"broadcast": 16}, {}, {}],
    "broadcast_in_a_pair": [{}, {}, {"broadcast": 16}, {"broadcast": 16}],
    "all_gather": [{}] * 4,
    "all_gather_into_tensor": [{"all_gather": 12}] * 4,  # 4 x 3
    "all_gather_in_a_pair": [{"all_gather": 16}] * 4,  # 16 x 1
    "all_gather_object": [{}] * 4,
    "reduce_scatter_sum": [{"reduce_scatter": 48}] * 4,  # 64 x 3/4
    "reduce_scatter_average": [{"reduce_scatter": 6}] * 4,
    "all_to_all_equal": [{"all_to_all": 6}] * 4,
    # Of 4, 8, 4 and 8 rows of 16 bytes, 0, 3, 2 and 1 stay.
    "all_to_all_unequal": [{"all_to_all": 64}, {"all_to_all": 80}, {"all_to_all": 32}, {"all_to_all": 112}],
    "ring": [{"send": 12}] * 4,  # 4 and 8
    "ring_of_a_pair": [{"send": 16}] * 4,
    "barrier": [{}] * 4,
    "functional_gather": [{"all_gather": 48}] * 4,
    "functional_permute": [{"all_to_all": 16}] * 4,
    "functional_sum": [{"all_reduce": 16}] * 4,
}
_NO_NUMBERS = {"product"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What every rank wrote."""
    folder = tmp_path_factory.mktemp("shared")
    shape = Shape(num_kv_heads=2, head_dim=64, attention_bias=True)
    request = VerifyRequest(
        methods=("ring", "upipe", *BROKEN),
        selection=Selection(shapes=(shape,)),
        plugins=tuple(BROKEN.values()),
    )
    cases = []
    for item in request.items():
        case, unsupported = resolve(item.case, list(BROKEN.values()))
        assert unsupported is None
        cases.append(case.model_dump(mode="json"))
    job = {"cases": cases, "plugins": [str(file) for file in BROKEN.values()], "stacks": STACKS}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = child_environment(4, single_node=True)
    run_ranks(WORKER, [str(folder / "job.json"), str(folder)], ranks=4, environment=environment, timeout=280)
    return [json.loads((folder / f"rank{r}.json").read_text(encoding="utf-8")) for r in RANKS]


@pytest.mark.parametrize("exchange", VALUES)
def test_an_exchange_gives_every_rank_what_it_should_have(exchange: str, ranks: list[Any]) -> None:
    """Values worked out by hand, in the world of four and in pairs of it, in several dtypes."""
    assert [rank["exchanges"][exchange]["value"] for rank in ranks] == VALUES[exchange]


@pytest.mark.parametrize("exchange", SENT)
def test_an_exchange_counts_what_a_rank_sends(exchange: str, ranks: list[Any]) -> None:
    """Bytes by kind; what methods never call, and control traffic, counts nothing."""
    assert [rank["exchanges"][exchange]["sent"] for rank in ranks] == SENT[exchange]


def test_no_exchange_is_left_out(ranks: list[Any]) -> None:
    """Each that the ranks made has values and bytes here."""
    made = set(ranks[0]["exchanges"]) - _NO_NUMBERS
    assert made == set(VALUES) == set(SENT)


def test_a_reduction_that_is_not_there_is_refused(ranks: list[Any]) -> None:
    """Every rank says so before it sends anything, and goes on."""
    for rank in ranks:
        assert "SUM, AVG, MAX or MIN" in rank["exchanges"]["product"]["value"]


def test_methods_pass_and_faults_are_found(ranks: list[Any]) -> None:
    """Every check of the block and a training with FSDP; wrong exchanges and sums fail by the checks that show them."""
    found = {r.method: r for r in map(Verification.model_validate, ranks[0]["results"])}

    for name in ("ring", "upipe"):
        assert found[name].verdict == "pass", found[name].reason
        kinds = {check.kind for check in found[name].checks}
        assert kinds == {"out", "gradients", "causality", "permutation", "sent", "loss", "grad norm"}
        assert sum(found[name].forward_sent.values()) > 0
    failed = {name: {check.name for check in found[name].checks if not check.passed} for name in BROKEN}
    assert found["broken-ring"].verdict == found["broken-replicas"].verdict == "fail"
    assert failed["broken-ring"] >= {"out", "dx", "causality", "sent (forward)"}
    assert failed["broken-replicas"] >= {"dwk", "dwv", "grad norm (long)"}
    assert not failed["broken-replicas"] & {"out", "causality"}
