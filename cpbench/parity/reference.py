"""Inputs of one attention block and its textbook result, in float32 with materialised scores, by autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from cpbench.case import Case
from cpbench.model.seeded import stream_id
from cpbench.model.tiling import rms_norm
from cpbench.model_config import ModelConfig
from cpbench.train import DTYPES

NO_WEIGHTS = ("x", "dout")
"""Inputs that are spread over the ranks; the others are weights, which every rank has."""


def make_inputs(case: Case, device: torch.device, draw: int = 0) -> dict[str, Tensor]:
    """Return x, dout `[b, s, d]` and the weights of one block, the same on every rank, in the case's dtype.

    Args:
        case: gives shapes, dtype and seed.
        device: of the tensors.
        draw: which of several independent ones of the same seed.
    """
    a, b, s = case.architecture, case.batch_size, case.seq_len
    rows = (b, s, a.hidden_dim)
    shapes: dict[str, tuple[int, ...]] = {"x": rows, "dout": rows} | a.attention_shapes()
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(
            stream_id(case.seed, f"parity/{draw}/{name}" if draw else f"parity/{name}") % 2**63
        )
        t = torch.randn(shape, generator=generator)
        if name.startswith("w"):
            t *= shape[1] ** -0.5
        elif name.endswith("norm"):
            t = 1 + 0.1 * t
        elif name.startswith("b"):
            t *= 0.1  # beside products of about 1; what all tokens have in common must not outweigh the rest
        made[name] = t.to(device, DTYPES[case.dtype])
    return made


def reference_block(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `out`, `dx` and the gradient of every weight of attention over the whole sequence, in float32."""
    a = case.architecture
    leaves = {n: t.detach().float().requires_grad_() for n, t in inputs.items() if n != "dout"}
    q, k, v = (
        functional.linear(leaves["x"], leaves[f"w{n}"], leaves.get(f"b{n}")).unflatten(-1, (-1, a.head_dim))
        for n in "qkv"
    )
    if a.qk_norm:
        q, k = rms_norm(q, leaves["q_norm"], a.norm_eps), rms_norm(k, leaves["k_norm"], a.norm_eps)
    q, k = (_rotate(t, a) for t in (q, k))
    k, v = (t.repeat_interleave(a.gqa_ratio, dim=2) for t in (k, v))
    scores = torch.einsum("bshe,bthe->bhst", q, k) * a.head_dim**-0.5
    mask = torch.ones(case.seq_len, case.seq_len, dtype=torch.bool, device=q.device).triu(1)
    out = torch.einsum("bhst,bthe->bshe", scores.masked_fill(mask, -math.inf).softmax(-1), v)
    y = functional.linear(out.flatten(2), leaves["wo"])
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["dout"].float())
    return {"out": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def relative_error(ours: Tensor, wanted: Tensor) -> float:
    """Return the larger of |a - b|_2 / |b|_2 and |a - b|_max / |b|_max; infinite if not finite."""
    difference = ours.double() - wanted.double()
    if not bool(torch.isfinite(difference).all()):
        return math.inf
    two = difference.norm() / wanted.double().norm().clamp_min(1e-300)
    largest = difference.abs().max() / wanted.double().abs().max().clamp_min(1e-300)
    return float(torch.maximum(two, largest))


def _rotate(t: Tensor, a: ModelConfig) -> Tensor:
    """RoPE by complex multiplication, a form that no method uses."""
    half = a.head_dim // 2
    frequency = a.rope_theta ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = torch.outer(torch.arange(t.shape[1], dtype=torch.float64, device=t.device), frequency)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    turned = torch.complex(t[..., :half].double(), t[..., half:].double()) * turn
    return torch.cat([turned.real, turned.imag], dim=-1).to(t.dtype)
