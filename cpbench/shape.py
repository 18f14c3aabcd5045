"""The shapes at which methods are verified: one by flags, a small matrix, or drawn at random from a seed.

The matrix for W ranks covers, with few shapes, every value that has its own code path somewhere:

    heads       as many KV heads as query heads; 4:1; 8:1 with fewer KV heads than ranks; a number that is no power of
                two, with KV heads that do not divide over the ranks; query heads that do not
    head_dim    64 and 128
    batch       1 and 2 (after an all-to-all, tensors of two sequences are no plain views)
    length      the shortest that every layout takes, 2 W; odd multiples of it; never a multiple of a tile
    qk-norm     with and without
    biases      of q, k and v: with qk-norm, without it, and none
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from math import gcd

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from cpbench.case import Case, Dtype
from cpbench.errors import UsageError
from cpbench.model_config import ModelConfig


class Shape(BaseModel):
    """Everything but the method that decides what a verification computes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    world_size: PositiveInt = 4
    """Ranks, real processes."""
    num_heads: PositiveInt = 8
    """Query heads, H."""
    num_kv_heads: PositiveInt = 4
    """Key/value heads, Hkv."""
    head_dim: PositiveInt = 32
    """Width of a head, e."""
    seq_len: PositiveInt = 104
    """Global sequence length S in tokens."""
    batch_size: PositiveInt = 1
    """Sequences."""
    qk_norm: bool = False
    """Queries and keys are normalised."""
    attention_bias: bool = False
    """The projections to queries, keys and values have biases."""
    hidden_dim: PositiveInt = 40
    """Width of the residual stream, d."""
    num_layers: PositiveInt = 2
    """Blocks of the whole model."""
    dtype: Dtype = "float32"
    """Compute dtype."""

    @classmethod
    def of(cls, case: Case) -> Shape:
        """Return the shape of a case."""
        a = case.architecture
        return cls(
            world_size=case.world_size,
            num_heads=a.num_heads,
            num_kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            seq_len=case.seq_len,
            batch_size=case.batch_size,
            qk_norm=a.qk_norm,
            attention_bias=a.attention_bias,
            hidden_dim=a.hidden_dim,
            num_layers=a.num_layers,
            dtype=case.dtype,
        )

    @property
    def title(self) -> str:
        """One line for people, for example `12/3 heads of 64, 2 x 40 tokens, qk-norm, float32`."""
        parts = [
            f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}",
            f"{self.batch_size} x {self.seq_len} tokens",
            *(["qk-norm"] if self.qk_norm else []),
            *(["biases"] if self.attention_bias else []),
            self.dtype,
        ]
        return ", ".join(parts)

    def architecture(self) -> ModelConfig:
        """Return a small model of this shape.

        Raises:
            UsageError: no model has this shape, for example because heads do not divide.
        """
        try:
            return ModelConfig(
                hidden_dim=self.hidden_dim,
                num_layers=self.num_layers,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                ffn_dim=2 * self.hidden_dim - 24,
                vocab_size=509,
                qk_norm=self.qk_norm,
                attention_bias=self.attention_bias,
            )
        except ValidationError as error:
            raise UsageError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def model_shape(world_size: int, dtype: Dtype = "float32") -> Shape:
    """Return the shape of the matrix at which whole models are trained: GQA 4:1, two sequences, qk-norm, biases."""
    heads = _multiple(world_size)
    return Shape(
        world_size=world_size,
        num_heads=4 * heads,
        num_kv_heads=heads,
        head_dim=128,
        seq_len=18 * world_size,
        batch_size=2,
        qk_norm=True,
        attention_bias=True,
        hidden_dim=104,
        dtype=dtype,
    )


def matrix(world_size: int, dtype: Dtype = "float32") -> tuple[Shape, ...]:
    """Return the shapes that the module docstring promises; the first is that of `model_shape`."""
    w, heads, few = world_size, _multiple(world_size), max(1, world_size // 2)
    shapes = [
        model_shape(w, dtype),
        _shape(w, 8 * few * (w // gcd(8 * few, w)), few, 64, 2 * w, 1, dtype),
        _shape(w, heads, heads, 64, 6 * w, 1, dtype),
        _shape(w, 3 * heads, 3, 64, 10 * w, 2, dtype, attention_bias=True),
    ]
    if w > 1:
        odd = (3 * w // 2, 3) if w % 2 == 0 else (w + 1, 1)
        shapes.append(_shape(w, *odd, 128, 26 * w, 1, dtype))
    return tuple(shapes)


def random_shapes(world_size: int, count: int, seed: int, dtypes: Iterable[Dtype]) -> tuple[Shape, ...]:
    """Return shapes drawn from a seed; half of them have query heads that divide over the ranks.

    Args:
        world_size: of all of them.
        count: how many, for each dtype.
        seed: the same seed gives the same shapes.
        dtypes: compute dtypes.
    """
    found = []
    for dtype in dtypes:
        draw = random.Random(f"{seed}/{world_size}/{dtype}")
        for index in range(count):
            kv = draw.randint(1, 6)
            step = world_size // gcd(kv, world_size) if index % 2 == 0 else 1
            found.append(
                Shape(
                    world_size=world_size,
                    num_heads=kv * step * draw.randint(1, max(1, 6 // step)),
                    num_kv_heads=kv,
                    # A limit of bfloat16 is a ratio of two errors, which says nothing over a handful of numbers.
                    head_dim=draw.choice((2, 16, 24, 64, 128) if dtype == "float32" else (64, 128)),
                    seq_len=2 * world_size * draw.randint(1 if dtype == "float32" else 5, 17),
                    batch_size=draw.randint(1, 3),
                    qk_norm=draw.random() < 0.5,
                    attention_bias=draw.random() < 0.5,
                    hidden_dim=draw.choice((16, 40, 56)),
                    dtype=dtype,
                )
            )
    return tuple(found)


def _multiple(world_size: int) -> int:
    """The smallest multiple of the ranks that is at least 4."""
    return world_size * -(-4 // world_size)


def _shape(
    w: int,
    heads: int,
    kv: int,
    head_dim: int,
    seq_len: int,
    batch: int,
    dtype: Dtype,
    *,
    attention_bias: bool = False,
) -> Shape:
    return Shape(
        world_size=w,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        seq_len=seq_len,
        batch_size=batch,
        attention_bias=attention_bias,
        dtype=dtype,
    )
