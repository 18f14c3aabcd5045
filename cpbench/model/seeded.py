"""Weights and tokens as pure functions of a seed and a position, so that every world size computes the same thing.

A counter-based hash (the finaliser of SplitMix64, Steele et al. 2014) turns (seed, stream, index) into 53 random bits.
A rank makes its own shard or its own tokens without drawing anyone else's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_CHUNK = 2**22  # elements hashed at a time: temporaries stay at 32 MiB each


def _signed(value: int) -> int:
    """Wrap an unsigned 64-bit constant into what int64 arithmetic takes."""
    return value - 2**64 if value >= 2**63 else value


def _hash_(index: Tensor, stream: int) -> Tensor:
    """SplitMix64 of int64 counters, in place; the multiplications wrap."""

    def shift(t: Tensor, bits: int) -> Tensor:  # logical, where int64 has only the arithmetic shift
        return (t >> bits) & ((1 << (64 - bits)) - 1)

    z = index.mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(stream))
    z.bitwise_xor_(shift(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    z.bitwise_xor_(shift(z, 27)).mul_(_signed(0x94D049BB133111EB))
    return z.bitwise_xor_(shift(z, 31))


def stream_id(seed: int, name: str) -> int:
    """Return the 64-bit stream of a name under a seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def tokens_at(
    segments: Sequence[tuple[int, int]],
    *,
    vocab_size: int,
    batch_size: int,
    seed: int,
    step: int,
    device: torch.device,
) -> Tensor:
    """Return the token ids at global positions, `[b, n]` int64.

    Args:
        segments: positions [start, stop) in local order.
        vocab_size: ids are below it.
        batch_size: independent sequences.
        seed: of the data.
        step: every step has other tokens.
        device: where the result lives.
    """
    rows = []
    for sequence in range(batch_size):
        stream = stream_id(seed, f"tokens/{step}/{sequence}")
        position = torch.cat([torch.arange(start, stop, device=device) for start, stop in segments])
        rows.append((_hash_(position, stream) & (2**62 - 1)) % vocab_size)
    return torch.stack(rows)


def initialise(model: nn.Module, *, seed: int, num_layers: int) -> None:
    """Fill the parameters: norms with ones, matrices and biases uniform with standard deviation 0.02 (GPT-2's).

    Biases usually begin at zero; here they do not, so that one that is forgotten changes the loss.

    Output projections of the residual stream (`wo`, `down`) are scaled by 1/sqrt(2 L), as in GPT-2.  Each rank fills
    its own shard (FSDP2 shards the first dimension).
    """
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "norm" or leaf.endswith("_norm"):
            local.fill_(1.0)
            continue
        std = 0.02 / (2 * num_layers) ** 0.5 if leaf in ("wo", "down") else 0.02
        _fill_uniform(local, stream_id(seed, name), _first_index(parameter), std)


def _first_index(parameter: Tensor) -> int:
    """Index in the whole parameter of the first element of this rank's shard."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh = parameter.device_mesh
    rows = -(
        -parameter.shape[0] // mesh.size()
    )  # torch.chunk gives ceil(n / ranks) rows to all but the last ranks
    row_elements = parameter.numel() // parameter.shape[0]
    return min(rows * mesh.get_local_rank(), parameter.shape[0]) * row_elements


def _fill_uniform(local: Tensor, stream: int, first: int, std: float) -> None:
    flat = local.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        stop = min(start + _CHUNK, flat.numel())
        bits = _hash_(torch.arange(first + start, first + stop, device=flat.device), stream)
        unit = ((bits >> 11) & (2**53 - 1)).to(torch.float64).mul_(2.0**-53)  # [0, 1)
        flat[start:stop] = unit.sub_(0.5).mul_(std * 12**0.5)
