"""Attention kernels against textbook attention, whole and in merged blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cpbench.case import Case
from cpbench.errors import Unsupported
from cpbench.model_config import PRESETS
from cpbench.runtime.kernels import Kernels, select_kernels
from cpbench.runtime.ring_attention import _merge_

CPU = Kernels("cpu-flash")


def textbook(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return (out, lse) with materialised scores."""
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bshe,bthe->bhst", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhst,bthe->bshe", scores.softmax(-1), v), scores.logsumexp(-1)


def tensors(b: int, s: int, t: int, h: int, k: int, e: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, s, h, e), (b, t, k, e), (b, t, k, e), (b, s, h, e))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(37, 37, True), (1, 1, True), (19, 64, False)])
def test_cpu_flash_equals_textbook_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, queries: int, keys: int, causal: bool
) -> None:
    """Output, log-sum-exp and all three gradients agree, for MHA and GQA, odd lengths and both masks."""
    q, k, v, dout = tensors(2, queries, keys, heads, kv_heads, 32, dtype)
    leaves = [t.float().requires_grad_() for t in (q, k, v)]
    expected, expected_lse = textbook(*leaves, causal=causal)
    expected.backward(dout.float())

    out, lse = CPU.forward(q, k, v, causal=causal, scale=32**-0.5)
    grads = CPU.backward(dout, q, k, v, out, lse, causal=causal, scale=32**-0.5)

    # bfloat16: inputs, probabilities and outputs are rounded to 8 bits, errors of a few 2**-8 of the largest value.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), expected.detach(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse.detach(), atol=tolerance, rtol=tolerance)
    for ours, leaf in zip(grads, leaves, strict=True):
        assert leaf.grad is not None
        assert ours.shape == leaf.shape
        # A single query's dq and dk are zero, so the scale is at least that of dout.
        assert (ours.float() - leaf.grad).norm() < tolerance * leaf.grad.norm().clamp_min(1)


def test_blocks_merged_by_log_sum_exp_equal_the_whole() -> None:
    """Attention to two runs of keys, merged in place, is attention to both."""
    q, k, v, _ = tensors(2, 24, 48, 4, 2, 16, torch.float32)
    whole, whole_lse = CPU.forward(q, k, v, causal=False, scale=0.25)

    out, lse = CPU.forward(q, k[:, :20], v[:, :20], causal=False, scale=0.25)
    _merge_(out, lse, *CPU.forward(q, k[:, 20:], v[:, 20:], causal=False, scale=0.25))

    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)


def test_a_backend_of_another_device_is_refused_with_the_choices() -> None:
    """Asking for a CUDA kernel on CPU names what is allowed."""
    case = Case(
        method="single",
        model="tiny",
        architecture=PRESETS["tiny"],
        seq_len=8,
        world_size=1,
        attention_backend="cudnn",
    )

    with pytest.raises(Unsupported, match="'cudnn' does not run on cpu; choose auto, cpu-flash"):
        select_kernels(case)


def test_float32_on_cuda_is_refused_with_the_way_out() -> None:
    """Flash attention on CUDA has no float32 kernel, and the message says what to do."""
    case = Case(
        method="single",
        model="tiny",
        architecture=PRESETS["tiny"],
        seq_len=8,
        world_size=1,
        device="cuda",
        dtype="float32",
    )

    with pytest.raises(Unsupported, match="use --dtype bfloat16"):
        select_kernels(case)


def test_custom_ops_match_their_fake_implementations() -> None:
    """Shapes, strides and dtypes under fake tensors are those of the real kernel."""
    q, k, v, dout = tensors(2, 12, 12, 4, 2, 16, torch.float32)
    checks = ("test_schema", "test_faketensor")

    forward = torch.library.opcheck(
        torch.ops.cpbench.attention_forward, (q, k, v, True, 0.25, "cpu-flash"), test_utils=checks
    )
    out, lse = CPU.forward(q, k, v, causal=True, scale=0.25)
    backward = torch.library.opcheck(
        torch.ops.cpbench.attention_backward,
        (dout, q, k, v, out, lse, True, 0.25, "cpu-flash"),
        test_utils=checks,
    )

    assert forward == backward == dict.fromkeys(checks, "SUCCESS")
