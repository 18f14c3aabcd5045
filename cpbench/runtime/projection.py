"""Projections of hidden states to heads, with optional bias, qk-norm and RoPE, and their hand-written gradients.

These run inside a method's own autograd function, so that a method decides when each tensor exists.  Gradients of x
accumulate into one buffer by GEMM (`addmm_`: float32 inside, rounded to the buffer's dtype after each call).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from cpbench.runtime.rope import Rope
from cpbench.runtime.tiles import tiles

_TILE_ELEMENTS = 2**21  # rows of a norm tile are chosen so that float32 temporaries stay at 8 MiB each


Which = Literal["q", "k", "v"]


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm over the head dimension of queries or keys (Qwen3's qk-norm)."""

    weight: Tensor  # [e]
    eps: float


@dataclass(frozen=True, slots=True)
class Projection:
    """What makes one of q, k and v of hidden states: a product, then what of the rest there is, in this order."""

    weight: Tensor  # [h*e, d]
    bias: Tensor | None = None  # [h*e]
    norm: HeadNorm | None = None
    rope: Rope | None = None


@dataclass(frozen=True, slots=True)
class ProjectionGradients:
    """Gradients of a projection's parameters, None where it has none."""

    weight: Tensor  # [h*e, d]
    bias: Tensor | None  # [h*e], float32
    norm: Tensor | None  # [e], float32

    def named(self, which: Which) -> dict[str, Tensor | None]:
        """Return them by the names of `cpbench.method.ATTENTION_WEIGHTS`; values have no norm there."""
        return {f"w{which}": self.weight, f"b{which}": self.bias, f"{which}_norm": self.norm}


def project(x: Tensor, projection: Projection, head_dim: int) -> Tensor:
    """Return heads of x: `[b, n, d], [h*e, d] -> [b, n, h, e]`, normalised, then rotated."""
    norm, rope = projection.norm, projection.rope
    t = functional.linear(x, projection.weight, projection.bias).unflatten(-1, (-1, head_dim))
    if norm is not None:
        flat = t.view(-1, head_dim)
        for rows in tiles(flat.shape[0], _TILE_ELEMENTS // head_dim):
            tile = flat[rows]
            tile.copy_(functional.rms_norm(tile.float(), (head_dim,), eps=norm.eps) * norm.weight.float())
    return t if rope is None else rope.rotate_(t)


def project_backward(
    grad: Tensor, x: Tensor, projection: Projection, dx: Tensor, *, first: bool = False
) -> ProjectionGradients:
    """Undo `project`: add to dx and return the gradients of the parameters.

    Args:
        grad: gradient of the heads, `[b, n, h, e]`; overwritten.
        x: as given to `project`.
        projection: as given to `project`; the input of its norm is recomputed by one GEMM rather than kept.
        dx: gradient of x, `[b, n, d]`; added to, or written when `first`.
        first: dx holds nothing yet.
    """
    grad, bias_grad, norm_grad = head_gradient(grad, x, projection)
    flat_x, flat_dx = x.flatten(0, 1), dx.flatten(0, 1)
    if first:
        torch.mm(grad, projection.weight, out=flat_dx)
    else:
        flat_dx.addmm_(grad, projection.weight)
    return ProjectionGradients(grad.t() @ flat_x, bias_grad, norm_grad)


def head_gradient(
    grad: Tensor, x: Tensor, projection: Projection
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Undo rotation, norm and bias of `project`, but not its GEMM.

    Args:
        grad: gradient of the heads, `[b, n, h, e]`; overwritten.
        x: as given to `project`.
        projection: as given to `project`.

    Returns:
        (gradient of the GEMM's output, `[b*n, h*e]`, in grad's storage; gradient of the bias or None; of norm.weight or
        None).  The last two are sums over tokens in float32, for the caller to add to or to round.
    """
    head_dim, norm = grad.shape[-1], projection.norm
    grad = grad.contiguous()  # an all-to-all of one head a rank gives a transposed view
    if projection.rope is not None:
        projection.rope.rotate_(grad, inverse=True)
    norm_grad = None
    if norm is not None:
        raw = functional.linear(x, projection.weight, projection.bias).view(-1, head_dim)
        norm_grad = _norm_backward_(grad.view(-1, head_dim), raw, norm)
        del raw
    flat = grad.flatten(2).flatten(0, 1)
    return flat, None if projection.bias is None else _bias_gradient(flat), norm_grad


def _bias_gradient(grad: Tensor) -> Tensor:
    """Sum `[b*n, h*e]` over tokens in float32; in tiles, because on CPU such a sum makes a float32 copy."""
    total = torch.zeros(grad.shape[1], dtype=torch.float32, device=grad.device)
    for rows in tiles(grad.shape[0], _TILE_ELEMENTS // grad.shape[1], sums=True):
        total += grad[rows].sum(0, dtype=torch.float32)
    return total


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
    return weight_grad
