"""PyTorch's context_parallel: what it refuses, where it puts tokens, and its ring function on real CPU ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor.experimental._attention import _HeadTailLoadBalancer

from cpbench import registry
from cpbench.case import Case
from cpbench.model_config import ModelConfig
from cpbench.resolve import resolve
from cpbench.runtime.kernels import scratch_of
from cpbench.selection import Selection
from cpbench.shape import Shape
from cpbench.verify import VerifyRequest, verify

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "torch-ring.md"
ON_CPU = Path(__file__).parent / "plugins" / "torch_ring_on_cpu.py"


def request(**changes: object) -> Case:
    model = ModelConfig(
        hidden_dim=64, num_layers=1, num_heads=8, num_kv_heads=2, head_dim=8, ffn_dim=64, vocab_size=64
    )
    given = {
        "method": "torch-ring",
        "model": "small",
        "architecture": model,
        "seq_len": 96,
        "world_size": 4,
        "device": "cuda",
        "mode": "estimate",
    }
    return Case.model_validate(given | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "no operators for device=cpu"),
        ({"world_size": 1}, "world_size=1 makes no ring"),
        ({"seq_len": 100}, "seq_len=100 is not divisible by 8"),
    ],
)
def test_what_it_cannot_run_is_unsupported_with_the_reason(changes: dict[str, object], reason: str) -> None:
    """A case on CPU, on one rank, or of a length that does not divide is refused before anything is launched."""
    _, unsupported = resolve(request(**changes), [])

    assert reason in (unsupported or "")


@pytest.mark.parametrize("rotate", ["allgather", "alltoall"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_formulas_of_its_page_are_those_of_costs(ranks: int, rotate: str) -> None:
    """Each formula stands on the page and gives what `costs` gives."""
    case, unsupported = resolve(request(world_size=ranks, options={"rotate": rotate}), [])
    assert unsupported is None
    costs = registry.load(case.method, case.options).costs(case)
    tokens = 96 // ranks
    sizes = {"M": tokens * 8 * 8 * 2, "K": tokens * 2 * 8 * 2, "L": tokens * 8 * 4, "R": ranks}
    page = {
        name: formula.split(";")
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.count("|") == 3
        for name, formula in [[cell.strip() for cell in line.strip("|").split("|")]]
    }

    def value(name: str, **more: float) -> float:
        text = page[name][-1 if ranks == 2 else 0].replace(" for R = 2", "")
        product = re.sub(r"(\d)([A-Z])", r"\1*\2", text.replace("A'", "A"))
        product = re.sub(r"([A-Z]) (R|\()", r"\1*\2", product)
        found: float = eval(product, {**sizes, **more})
        return found

    forward, backward = ("", "") if rotate == "allgather" else (", forward", ", backward")
    held = value(f"V, `{rotate}`{backward}")
    a_last, a_first = (
        scratch_of("cuda-flash", (1, q, 8, 8), (1, k, 2, 8), 2, backward=True)
        for q, k in ((tokens, tokens // 2), (tokens // 2, tokens))
    )
    assert sum(costs.forward_collective_bytes.values()) == value("sent forward")
    assert sum(costs.backward_collective_bytes.values()) == value("sent backward")
    assert costs.forward_peak_bytes == value("forward peak", V=value(f"V, `{rotate}`{forward}"))
    assert costs.backward_peak_bytes == max(
        value("backward peak, last rank", V=held, A=a_last),
        value("backward peak, ranks between", V=held, A=a_last) if ranks > 2 else 0,
        value("backward peak, first rank", V=held, A=a_first),
        value("backward, update of half of dq", V=held),
    )


def test_tokens_are_where_pytorch_puts_them() -> None:
    """The ranks' ranges, one rank after another, are the order of torch's head-tail load balancer."""
    case, unsupported = resolve(request(), [])
    assert unsupported is None
    method = registry.load(case.method, case.options)

    ours = [
        torch.arange(start, stop) for rank in range(4) for start, stop in method.layout(case, rank).segments
    ]

    theirs = _HeadTailLoadBalancer(96, 4, "cpu")._generate_indices()
    assert torch.equal(theirs[0], torch.cat(ours))


@pytest.mark.slow
def test_its_ring_function_equals_the_reference_on_cpu_ranks() -> None:
    """Both rotations, grouped queries, normalised, biases, a batch: output, gradients and a model within 1e-5."""
    shape = Shape(
        world_size=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        batch_size=2,
        qk_norm=True,
        attention_bias=True,
    )
    selection = Selection(shapes=(shape,), stacks={shape: ("long",)}, thorough=frozenset({shape}))

    report = verify(VerifyRequest(methods=("torch-ring-on-cpu",), selection=selection, plugins=(ON_CPU,)))

    assert [result.verdict for result in report.results] == ["pass", "pass"], report.results
