"""The seam: what a context-parallel method is to the harness.

A method replaces the *attention block*: it receives this rank's normalised hidden states and the attention weights
and returns hidden states of the same shape, so a method is free to chunk the projections (as UPipe and FPDT do), to
move the sequence over ranks, or to fuse the output projection.  A method is one file, `<name>.py`:

    line 1 of the docstring     what `cpbench list methods` shows
    class Options               a frozen dataclass whose fields are the method's options; it *is* the method
    METHOD = Options            what the registry loads

Legend of shapes everywhere: b batch, s full sequence, n = s / world_size, h query heads, k KV heads, e head_dim,
d hidden_dim.  Tensors that hold heads are `[b, s, h, e]`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

from cpbench.case import Case

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.runtime.context import AttentionContext


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Which tokens a rank holds and how the ranks are arranged."""

    ulysses_degree: int
    """Ranks that exchange heads by all-to-all, C; consecutive ranks form a group."""
    ring_degree: int
    """Ranks that pass K/V around, R; ranks with the same position in their Ulysses group form a ring."""
    segments: tuple[tuple[int, int], ...]
    """Global positions [start, stop) of this rank's tokens, in local order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Closed forms for one attention block on one rank; tests hold counted values against them.

    Bytes of a collective are those the rank sends to others (see `cpbench.runtime.collectives`).  Peaks are those of a
    block in a checkpointed stack; tiles of fixed size (a few MiB) are left out.
    """

    forward_collective_bytes: dict[str, int] = field(default_factory=dict)
    """By kind, one forward pass of the block."""
    backward_collective_bytes: dict[str, int] = field(default_factory=dict)
    """By kind, one backward pass of the block, the recomputation inside it included, the checkpoint's not."""
    forward_peak_bytes: int = 0
    """Most bytes the block holds in forward beyond its input, its output and the weights, kernel scratch included."""
    backward_peak_bytes: int = 0
    """The same in the recomputation and the backward of a checkpointed block, beyond x, dy, dx and weight gradients."""


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """The unsharded parameters of one attention block."""

    wq: Tensor  # [h*e, d]
    wk: Tensor  # [k*e, d]
    wv: Tensor  # [k*e, d]
    wo: Tensor  # [d, h*e]
    q_norm: Tensor | None = None  # [e], only with ModelConfig.qk_norm
    k_norm: Tensor | None = None  # [e]
    bq: Tensor | None = None  # [h*e], only with ModelConfig.attention_bias
    bk: Tensor | None = None  # [k*e]
    bv: Tensor | None = None  # [k*e]

    @classmethod
    def of(cls, tensors: Iterable[Tensor | None]) -> AttentionWeights:
        """Return the weights from tensors in the order of `ATTENTION_WEIGHTS`."""
        return cls(*tensors)  # type: ignore[arg-type]  # the first four are in every model

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return all in the order of `ATTENTION_WEIGHTS`, as an autograd function takes them."""
        return tuple(getattr(self, name) for name in ATTENTION_WEIGHTS)


ATTENTION_WEIGHTS = tuple(weight.name for weight in fields(AttentionWeights))
"""Names of the parameters of an attention block; its gradients have the same order."""


class Method(Protocol):
    """What `METHOD(**options)` must be."""

    def check(self, case: Case) -> None:
        """Raise `Unsupported` when the method cannot run the case: the value, what is allowed, what to do."""

    def layout(self, case: Case, rank: int) -> Layout:
        """Return the degrees and the token ranges of `rank`; the ranges of all ranks cover [0, s) exactly once."""

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        """Return the attention block's output, differentiable in x and in every weight.

        Args:
            x: normalised hidden states of this rank's tokens, `[b, n, d]`.
            weights: the block's parameters, in the compute dtype.
            ctx: groups, kernels and buffers; everything a method may touch besides its arguments.

        Returns:
            `[b, n, d]`; the harness may overwrite its storage, so a method must not need it in backward.
        """

    def costs(self, case: Case) -> Costs:
        """Return the closed-form costs of one block; the derivation is in the docstring."""


def representative_ranks(layout: Layout) -> tuple[int, ...]:
    """Return the ranks whose maximum is that of all ranks, in memory and in time.

    Ranks of a Ulysses group do the same.  Of a ring, every place but the first and the last meets both kinds of hop
    (keys from an earlier and from a later rank), so it holds as much as any; with contiguous tokens the last place has
    most to compute.  In a ring of two the places differ, and both are meant.

    Args:
        layout: of any rank; rank w is at place w // C of its ring, C the Ulysses degree.
    """
    last = layout.ring_degree - 1
    return tuple(
        place * layout.ulysses_degree for place in sorted({min(1, last), last, 0 if last < 2 else last})
    )


def contiguous_segments(seq_len: int, world_size: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Return one block of s / world_size tokens, in rank order."""
    tokens = seq_len // world_size
    return ((rank * tokens, (rank + 1) * tokens),)


def zigzag_segments(
    seq_len: int, ring_degree: int, ring_rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return chunks r and 2R-1-r of 2R, so that every ring rank has the same causal work."""
    chunk = seq_len // (2 * ring_degree)
    late = 2 * ring_degree - 1 - ring_rank
    return (ring_rank * chunk, (ring_rank + 1) * chunk), (late * chunk, (late + 1) * chunk)


def hybrid_segments(
    seq_len: int, ulysses_degree: int, ring_degree: int, rank: int
) -> tuple[tuple[int, int], ...]:
    """Return the ranges of a rank on a Ulysses x ring mesh: zigzag over the ring, contiguous over the Ulysses group.

    Rank w is ring rank w // C and Ulysses rank w % C.  After the all-to-all a ring rank then holds its early chunk
    followed by its late chunk, in order, so causality holds (a zigzag over all W ranks would leak).
    """
    if ring_degree == 1:
        return contiguous_segments(seq_len, ulysses_degree, rank)
    tokens = seq_len // (ulysses_degree * ring_degree)
    begin = (rank % ulysses_degree) * tokens
    found: list[tuple[int, int]] = []
    offset = 0  # of the chunk in what the ring rank holds after the all-to-all
    for start, stop in zigzag_segments(seq_len, ring_degree, rank // ulysses_degree):
        low, high = max(begin, offset), min(begin + tokens, offset + stop - start)
        if low < high:
            found.append((start + low - offset, start + high - offset))
        offset += stop - start
    return tuple(found)
