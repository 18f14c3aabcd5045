"""Weights and tokens depend on the seed and the position only."""

from __future__ import annotations

import torch

from cpbench.model.seeded import _fill_uniform, _hash_, stream_id, tokens_at

CPU = torch.device("cpu")
MASK = 2**64 - 1


def splitmix(index: int, stream: int) -> int:
    """SplitMix64's finaliser in Python integers, the reference."""
    z = (index * 0x9E3779B97F4A7C15 + stream) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_hash_is_splitmix() -> None:
    """The int64 arithmetic with wrapping multiplications equals the unsigned definition."""
    stream = stream_id(7, "name")

    ours = _hash_(torch.arange(100), stream)

    assert [splitmix(i, stream) for i in range(100)] == [int(v) & MASK for v in ours]


def test_a_shard_is_a_piece_of_the_whole() -> None:
    """Filling a part with its offset gives the same numbers as filling everything."""
    whole, part = torch.empty(1000), torch.empty(300)

    _fill_uniform(whole, 5, 0, 0.02)
    _fill_uniform(part, 5, 600, 0.02)

    assert torch.equal(whole[600:900], part)
    assert abs(whole.std().item() - 0.02) < 0.001
    assert abs(whole.mean().item()) < 0.002


def test_tokens_follow_positions_and_not_ranks() -> None:
    """Two segments give the tokens of those positions, in order, and every step has others."""

    def tokens(*segments: tuple[int, int], step: int = 0) -> torch.Tensor:
        return tokens_at(segments, vocab_size=97, batch_size=2, seed=0, step=step, device=CPU)

    whole = tokens((0, 64))

    assert torch.equal(torch.cat([whole[:, 8:16], whole[:, 40:48]], dim=1), tokens((8, 16), (40, 48)))
    assert not torch.equal(whole, tokens((0, 64), step=1))
    assert not torch.equal(whole[0], whole[1])
    assert 0 <= int(whole.min()) <= int(whole.max()) < 97
