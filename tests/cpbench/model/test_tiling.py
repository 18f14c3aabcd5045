"""Tiled functions equal their untiled forms, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cpbench.model.tiling import (
    TiledLoss,
    TiledMlp,
    TiledNorm,
    cross_entropy_sum,
    rms_norm,
    swiglu,
)
from cpbench.runtime.tiles import sampled_tiles, tiles

B, N, D, F, V = 2, 23, 12, 20, 31
EPS = 1e-5


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).float().requires_grad_()
        for shape in shapes
    ]


def assert_same(ours: Callable[[], Tensor], plain: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    """Compare outputs and the gradients of all inputs for a random upstream gradient."""
    results = []
    for function in (ours, plain):
        for leaf in inputs:
            leaf.grad = None
        y = function()
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y) if y.dim() else torch.tensor(0.7))
        results.append([y.detach(), *(leaf.grad.clone() for leaf in inputs if leaf.grad is not None)])
    assert len(results[0]) == 1 + len(inputs)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("tile", [1, 7, 23, 100])
def test_tiled_norm_equals_norm(tile: int) -> None:
    """Any tile size gives RMSNorm's output and gradients."""
    x, weight = leaves((B, N, D), (D,))

    assert_same(lambda: TiledNorm.apply(x, weight, EPS, tile), lambda: rms_norm(x, weight, EPS), [x, weight])


@pytest.mark.parametrize("tile", [1, 7, 23, 100])
def test_tiled_mlp_equals_mlp(tile: int) -> None:
    """Any tile size gives h + swiglu(norm(h)) and its gradients."""
    h, norm, gate, up, down = inputs = leaves((B, N, D), (D,), (F, D), (F, D), (D, F))

    assert_same(
        lambda: TiledMlp.apply(h, EPS, tile, norm, gate, up, down),
        lambda: h + swiglu(rms_norm(h, norm, EPS), gate, up, down),
        inputs,
    )


@pytest.mark.parametrize("tile", [1, 7, 23, 100])
def test_tiled_loss_equals_loss(tile: int) -> None:
    """Any tile size gives the scaled cross-entropy and its gradients, upstream gradient included."""
    h, norm, head = inputs = leaves((B, N, D), (D,), (V, D))
    labels = torch.arange(B * N).view(B, N) % V

    assert_same(
        lambda: TiledLoss.apply(h, labels, EPS, tile, 0.25, norm, head),
        lambda: cross_entropy_sum(rms_norm(h, norm, EPS) @ head.t(), labels) * 0.25,
        inputs,
    )


def test_slices_cover_the_rows_once() -> None:
    """Tiles meet without gap or overlap and the last is shorter."""
    assert [slice(0, 4), slice(4, 8), slice(8, 10)] == list(tiles(10, 4))
    assert [slice(0, 10)] == list(tiles(10, None))


def test_sampled_tiles_are_those_that_differ() -> None:
    """An estimate runs the tiles that differ: three and the last where they add up, else two and the last."""
    with sampled_tiles():
        assert [slice(0, 4), slice(4, 8), slice(8, 12), slice(16, 18)] == list(tiles(18, 4, sums=True))
        assert [slice(0, 4), slice(4, 8), slice(8, 10)] == list(tiles(10, 4, sums=True))
        assert [slice(0, 4), slice(4, 8), slice(16, 18)] == list(tiles(18, 4))
    assert len(list(tiles(18, 4))) == 5
