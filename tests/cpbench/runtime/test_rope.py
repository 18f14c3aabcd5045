"""Rotary embedding by global position."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from cpbench.runtime import rope as rope_module
from cpbench.runtime.rope import Rope


def test_inverse_undoes_the_rotation() -> None:
    """Rotating back gives the input, for two segments of different length."""
    t = torch.randn(2, 7, 3, 8)
    rope = Rope(((5, 9), (100, 103)), 1e4)

    back = rope.rotate_(rope.rotate_(t.clone()), inverse=True)

    torch.testing.assert_close(back, t)


def test_angle_at_five_million_is_exact() -> None:
    """At position 5M the rotation still agrees with double precision; float32 angles would be off by 0.1 and more."""
    position = 5 * 2**20 - 1
    t = torch.zeros(1, 1, 1, 4)
    t[..., 0] = 1

    Rope(((position, position + 1),), 1e4).rotate_(t)

    assert abs(t[0, 0, 0, 0].item() - math.cos(position)) < 1e-6
    assert abs(t[0, 0, 0, 2].item() - math.sin(position)) < 1e-6


@given(tile=st.integers(1, 50), tokens=st.integers(1, 40))
def test_tiles_do_not_change_the_result(tile: int, tokens: int) -> None:
    """Any tile size gives the same rotation, also when it does not divide the tokens."""
    t = torch.randn(1, tokens, 2, 6, generator=torch.Generator().manual_seed(tokens))
    rope = Rope(((3, 3 + tokens),), 100.0)
    whole = rope.rotate_(t.clone())

    original = rope_module._TILE_ELEMENTS
    rope_module._TILE_ELEMENTS = tile * 12
    try:
        tiled = rope.rotate_(t.clone())
    finally:
        rope_module._TILE_ELEMENTS = original

    assert torch.equal(whole, tiled)


def test_a_relative_shift_keeps_scores() -> None:
    """Scores of rotated queries and keys depend on the distance of their positions only."""
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(at_q: int, at_k: int) -> float:
        a = Rope(((at_q, at_q + 1),), 1e4).rotate_(q.clone())
        b = Rope(((at_k, at_k + 1),), 1e4).rotate_(k.clone())
        return float((a * b).sum())

    assert abs(score(10, 3) - score(1007, 1000)) < 1e-4
    assert abs(score(10, 3) - score(10, 4)) > 1e-4
