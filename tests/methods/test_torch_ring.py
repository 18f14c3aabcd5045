"""PyTorch's context_parallel: what it refuses, where it puts tokens, and its ring function on real CPU ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor.experimental._attention import _HeadTailLoadBalancer

from cpbench import registry
from cpbench.case import Case
from cpbench.model_config import ModelConfig
from cpbench.resolve import resolve
from cpbench.selection import Selection
from cpbench.shape import Shape
from cpbench.verify import VerifyRequest, verify

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
