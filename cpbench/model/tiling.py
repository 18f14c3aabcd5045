"""RMSNorm, MLP and loss in token tiles: temporaries of fixed size, recomputed in backward, float32 weight gradients.

Each function also runs with a single tile, which is then the untiled computation; tiling is a memory choice and
changes no result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cpbench.runtime.tiles import tiles


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tokens of one tile; None runs everything at once."""

    norm: int | None = None
    mlp: int | None = None
    loss: int | None = None
    parts: int = 2**22
    """Not tokens but elements: see `AttentionContext.parts_tile`; the same in every stack."""


TILES = Tiles(norm=4096, mlp=2048, loss=1024)
"""Sizes when a stack asks for tiling: at hidden 4096 a tile's float32 temporaries stay near 0.5 GiB."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight over the last dimension, computed in float32, in x's dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return (silu(x gate^T) * (x up^T)) down^T; weights are `[f, d], [f, d], [d, f]`."""
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)


class WeightGradients:
    """Sums of weight gradients over tiles, in float32; a single tile keeps its gradients as they are."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = weights
        self._first: list[Tensor] | None = None
        self._sums: list[Tensor] | None = None

    def add(self, grads: Sequence[Tensor]) -> None:
        """Add one tile's gradients."""
        if self._sums is not None:
            for total, grad in zip(self._sums, grads, strict=True):
                total.add_(grad)
        elif self._first is None:
            self._first = list(grads)
        else:
            self._sums = [first.float().add_(grad) for first, grad in zip(self._first, grads, strict=True)]
            self._first = None

    def finish(self) -> list[Tensor]:
        """Return the sums in the weights' dtype."""
        if self._sums is None:
            return self._first or [torch.zeros_like(w) for w in self._weights]
        sums, self._sums = self._sums, None
        # One at a time, so that not all exist twice.
        return [sums.pop(0).to(weight.dtype) for weight in self._weights]


def tile_gradients(
    function: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor], upstream: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run one tile with gradients: (output, gradient of x, gradients of weights)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        leaves = [w.detach().requires_grad_() for w in weights]
        output = function(leaf, *leaves)
        grads = torch.autograd.grad(output, [leaf, *leaves], upstream)
    return output.detach(), grads[0], list(grads[1:])


def norm_tiled(x: Tensor, weight: Tensor, eps: float, tile: int | None) -> Tensor:
    """RMSNorm of `[b, n, d]` without a graph, tile by tile."""
    if tile is None or x.shape[1] <= tile:
        return rms_norm(x, weight, eps)
    out = torch.empty_like(x)
    for rows in tiles(x.shape[1], tile):
        out[:, rows] = rms_norm(x[:, rows], weight, eps)
    return out


def norm_backward_into(
    total: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float, tile: int | None
) -> Tensor:
    """Add the norm's gradient of x to `total` in place and return the gradient of its weight."""
    sums = WeightGradients([weight])
    for rows in tiles(x.shape[1], tile, sums=True):
        _, dx, dw = tile_gradients(lambda t, w: rms_norm(t, w, eps), x[:, rows], [weight], grad[:, rows])
        total[:, rows] += dx
        sums.add(dw)
    return sums.finish()[0]


def mlp_tiled_(h: Tensor, weights: Sequence[Tensor], eps: float, tile: int | None) -> Tensor:
    """Add swiglu(norm(h)) to h in place, without a graph; weights are (norm, gate, up, down)."""
    norm, gate, up, down = weights
    for rows in tiles(h.shape[1], tile):
        h[:, rows] += swiglu(rms_norm(h[:, rows], norm, eps), gate, up, down)
    return h


def mlp_backward_into(
    dh: Tensor, h: Tensor, weights: Sequence[Tensor], eps: float, tile: int | None
) -> list[Tensor]:
    """Turn the gradient after `mlp_tiled_` into the one before it, in place; return the weights' gradients.

    Each tile recomputes its forward, so nothing of width f is kept between forward and backward.
    """
    sums = WeightGradients(weights)

    def tile_forward(t: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return swiglu(rms_norm(t, norm, eps), gate, up, down)

    for rows in tiles(h.shape[1], tile, sums=True):
        _, dx, dw = tile_gradients(tile_forward, h[:, rows], weights, dh[:, rows])
        dh[:, rows] += dx
        del dx
        sums.add(dw)
        del dw
    return sums.finish()


class TiledNorm(torch.autograd.Function):
    """RMSNorm in tiles, keeping only its input."""

    @staticmethod
    def forward(node: Any, x: Tensor, weight: Tensor, eps: float, tile: int | None) -> Tensor:  # noqa: ANN401
        """Return the normalised `[b, n, d]`."""
        node.save_for_backward(x, weight)
        node.eps, node.tile = eps, tile
        return norm_tiled(x, weight, eps, tile)

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> Any:  # noqa: ANN401 - autograd's signature
        """Return the gradients of x and of the weight."""
        x, weight = node.saved_tensors
        dx = torch.zeros_like(x)
        return dx, norm_backward_into(dx, grads[0], x, weight, node.eps, node.tile), None, None


class TiledMlp(torch.autograd.Function):
    """h + swiglu(norm(h)) in tiles, keeping only h."""

    @staticmethod
    def forward(node: Any, h: Tensor, eps: float, tile: int | None, *weights: Tensor) -> Tensor:  # noqa: ANN401
        """Return `[b, n, d]`; weights are (norm, gate, up, down)."""
        node.save_for_backward(h, *weights)
        node.eps, node.tile = eps, tile
        return mlp_tiled_(h.clone(), weights, eps, tile)

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> Any:  # noqa: ANN401 - autograd's signature
        """Return the gradients of h and of the weights."""
        h, *weights = node.saved_tensors
        dh = grads[0].clone()
        return (dh, None, None, *mlp_backward_into(dh, h, weights, node.eps, node.tile))


class TiledLoss(torch.autograd.Function):
    """Sum of cross-entropies of head(norm(h)) in row tiles; gradients are computed in the forward pass.

    Logits exist for one tile at a time, and are computed once.  What is kept is the gradient of h and of the weights.
    """

    @staticmethod
    def forward(
        node: Any,  # noqa: ANN401 - autograd's context has no public type
        h: Tensor,
        labels: Tensor,
        eps: float,
        tile: int | None,
        scale: float,
        norm: Tensor,
        head: Tensor,
    ) -> Tensor:
        """Return scale x the sum over `[b, n]` tokens, as a float32 scalar."""

        def tile_loss(t: Tensor, norm_weight: Tensor, head_weight: Tensor) -> Tensor:
            logits = functional.linear(rms_norm(t, norm_weight, eps), head_weight)
            return cross_entropy_sum(logits, targets) * scale

        total = torch.zeros((), dtype=torch.float32, device=h.device)
        dh, sums = torch.empty_like(h), WeightGradients([norm, head])
        for rows in tiles(h.shape[1], tile, sums=True):
            targets = labels[:, rows]
            loss, dx, dw = tile_gradients(tile_loss, h[:, rows], [norm, head], None)
            total += loss
            dh[:, rows] = dx
            sums.add(dw)
            del dx, dw
        node.gradients = (dh, *sums.finish())
        return total

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> Any:  # noqa: ANN401 - autograd's signature
        """Return the kept gradients times the gradient of the loss."""
        dh, norm, head = (gradient.mul_(grads[0]) for gradient in node.gradients)
        node.gradients = None
        return dh, None, None, None, None, norm, head


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of cross-entropies of `[b, n, v]` logits, computed in float32."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
