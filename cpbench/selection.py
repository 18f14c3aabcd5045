"""Which shapes, option sets and stacks a verification covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cpbench.case import Dtype
from cpbench.shape import Shape, matrix, model_shape, random_shapes
from cpbench.verification import STACKS_CHECKED

_ALL_STACKS = tuple(STACKS_CHECKED)
_QUICK_STACKS = ("plain", "long")
RANDOM_SHAPES = 4
"""Shapes that a full verification draws in each dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What of everything that could be verified is verified; `single` runs each shape on one rank."""

    shapes: tuple[Shape, ...]
    """All of one world size."""
    stacks: Mapping[Shape, tuple[str, ...]] = field(default_factory=dict)
    """Stacks in which whole models are trained at a shape, by name; at other shapes, none.  Option sets other than a
    method's first train in the last stack only, since what they change lies inside attention."""
    counted: frozenset[Shape] = frozenset()
    """Shapes for whose heads peaks are counted; for option sets other than a method's first, only where models are
    trained too."""
    thorough: frozenset[Shape] = frozenset()
    """Shapes at which the option sets that a method declares run too; at others, its defaults alone."""


def quick(world_size: int, dtypes: Sequence[Dtype]) -> Selection:
    """Return one shape: GQA in a batch of two with qk-norm and biases."""
    shapes = tuple(model_shape(world_size, dtype) for dtype in dtypes)
    return Selection(
        shapes=shapes,
        stacks=dict.fromkeys(shapes, _QUICK_STACKS),
        counted=frozenset(shapes),
        thorough=frozenset(shapes),
    )


def standard(world_size: int, dtypes: Sequence[Dtype], *, random: int = 0, seed: int = 0) -> Selection:
    """Return the matrix of shapes; declared option sets at the first two (GQA; fewer KV heads than ranks).

    Args:
        world_size: ranks.
        dtypes: compute dtypes.
        random: further shapes in each dtype.
        seed: draws them.
    """
    shapes = [matrix(world_size, dtype) for dtype in dtypes]
    some = frozenset(shape for group in shapes for shape in group[:2])
    return Selection(
        shapes=(
            *(shape for group in shapes for shape in group),
            *random_shapes(world_size, random, seed, dtypes),
        ),
        stacks={group[0]: _ALL_STACKS for group in shapes},
        counted=frozenset(shape for group in shapes for shape in group),
        thorough=some,
    )


def full(
    world_size: int, dtypes: Sequence[Dtype], *, random: int = RANDOM_SHAPES, seed: int = 0
) -> Selection:
    """Return everything: every option set at every shape, random ones included."""
    some = standard(world_size, dtypes, random=random, seed=seed)
    return replace(some, thorough=frozenset(some.shapes))


def one_shape(shapes: Sequence[Shape]) -> Selection:
    """Return shapes that the user gave, with every stack and option set."""
    return Selection(
        shapes=tuple(shapes),
        stacks=dict.fromkeys(shapes, _ALL_STACKS),
        counted=frozenset(shapes),
        thorough=frozenset(shapes),
    )
