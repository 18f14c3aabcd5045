"""Projections of hidden states to heads, with optional qk-norm and RoPE, and their hand-written gradients.

These run inside a method's own autograd function, so that a method decides when each tensor exists.  Gradients of x
accumulate into one buffer by GEMM (`addmm_`: float32 inside, rounded to the buffer's dtype after each call).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cpbench.runtime.rope import Rope
from cpbench.runtime.tiles import tiles

_TILE_ELEMENTS = 2**21  # rows of a norm tile are chosen so that float32 temporaries stay at 8 MiB each


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm over the head dimension of queries or keys (Qwen3's qk-norm)."""

    weight: Tensor  # [e]
    eps: float


def project(
    x: Tensor, weight: Tensor, head_dim: int, *, norm: HeadNorm | None = None, rope: Rope | None = None
) -> Tensor:
    """Return heads of x: `[b, n, d], [h*e, d] -> [b, n, h, e]`, normalised, then rotated."""
    t = functional.linear(x, weight).unflatten(-1, (-1, head_dim))
    if norm is not None:
        flat = t.view(-1, head_dim)
        for rows in tiles(flat.shape[0], _TILE_ELEMENTS // head_dim):
            tile = flat[rows]
            tile.copy_(functional.rms_norm(tile.float(), (head_dim,), eps=norm.eps) * norm.weight.float())
    return t if rope is None else rope.rotate_(t)


def project_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor,
    *,
    norm: HeadNorm | None = None,
    rope: Rope | None = None,
    first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Undo `project`: add to dx and return the gradients of the weights.

    Args:
        grad: gradient of the heads, `[b, n, h, e]`; overwritten.
        x: as given to `project`.
        weight: as given to `project`.
        dx: gradient of x, `[b, n, d]`; added to, or written when `first`.
        norm: as given to `project`; its input is recomputed by one GEMM rather than kept.
        rope: as given to `project`.
        first: dx holds nothing yet.

    Returns:
        (gradient of weight, gradient of norm.weight or None).
    """
    grad, norm_grad = head_gradient(grad, x, weight, norm=norm, rope=rope)
    flat_x, flat_dx = x.flatten(0, 1), dx.flatten(0, 1)
    if first:
        torch.mm(grad, weight, out=flat_dx)
    else:
        flat_dx.addmm_(grad, weight)
    return grad.t() @ flat_x, norm_grad


def head_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, *, norm: HeadNorm | None = None, rope: Rope | None = None
) -> tuple[Tensor, Tensor | None]:
    """Undo rotation and norm of `project`, but not its GEMM.

    Args:
        grad: gradient of the heads, `[b, n, h, e]`; overwritten.
        x: as given to `project`.
        weight: as given to `project`.
        norm: as given to `project`.
        rope: as given to `project`.

    Returns:
        (gradient of the GEMM's output, `[b*n, h*e]`, in grad's storage; gradient of norm.weight or None).
    """
    head_dim = grad.shape[-1]
    grad = grad.contiguous()  # an all-to-all of one head a rank gives a transposed view
    if rope is not None:
        rope.rotate_(grad, inverse=True)
    norm_grad = None
    if norm is not None:
        raw = functional.linear(x, weight).view(-1, head_dim)
        norm_grad = _norm_backward_(grad.view(-1, head_dim), raw, norm)
        del raw
    return grad.flatten(2).flatten(0, 1), norm_grad


def _norm_backward_(grad: Tensor, raw: Tensor, norm: HeadNorm) -> Tensor:
    """Turn the gradient after the norm into the one before it, in place; return the weight's gradient."""
    weight = norm.weight.float()
    weight_grad = torch.zeros_like(weight)
    for rows in tiles(grad.shape[0], _TILE_ELEMENTS // grad.shape[-1], sums=True):
        g, r = grad[rows], raw[rows]
        up, pre = g.float(), r.float()
        inverse = torch.rsqrt(pre.square().mean(-1, keepdim=True) + norm.eps)
        unit = pre * inverse
        weight_grad += (up * unit).sum(0)
        scaled = up * weight
        g.copy_(inverse * (scaled - unit * (scaled * unit).mean(-1, keepdim=True)))
    return weight_grad.to(norm.weight.dtype)
