"""Closed forms of what attention over a ring holds while it runs (`cpbench.runtime.ring_attention`).

Bytes on one rank: m one of q, out, dq, dout; c one of k, v, dk, dv; l the float32 log-sum-exp; f = 4 / bytes of an
element; A(queries x keys) what the kernel allocates inside; two blocks of K/V are at hand while a hop is under way,
one at the last step.  The rank that needs most counts.

    forward     one rank                2m + 2c + l + A(n x n)
                first step              2m + 4c + l + A(n x n)                    own K/V and the arriving ones
                later steps             (2+f)m + (4 or 2)c + 2l + A(n x n/2)      out in float32, a part of it, two l
    backward    one rank                4m + 4c + l + A(n x n)
                first step              4m + 6c + l + A(n x n)
                all queries, half keys  (4+f)m + c + (4 or 2)c + 4fc + l + A      dq in float32; dk, dv in float32, one
                half queries, all keys  (3.5+f)m + 2c + (4 or 2)c + 4fc + l + A   pair sent and one received
                contiguous, all x all   (4+f)m + 2c + (4 or 2)c + 4fc + l + A
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cpbench.case import Case
from cpbench.runtime.kernels import scratch_of, select_kernels

Views = Literal["none", "columns", "whole"]


@dataclass(frozen=True, slots=True)
class RingShape:
    """The heads that one rank attends with, over the s/R tokens of its part of the ring."""

    batch_size: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    ring_degree: int
    element: int
    """Bytes of one element."""
    backend: str
    zigzag: bool = True
    kept: bool = False
    """Whether the caller holds own K/V throughout, where else they are given up at the first hop."""
    views: Views = "none"
    """Whether out and dout are tensors that the caller holds (whole), or columns of such, of which the kernel copies
    what it takes."""

    @classmethod
    def of(
        cls,
        case: Case,
        *,
        ring_degree: int,
        heads: int,
        kv_heads: int,
        zigzag: bool = True,
        kept: bool = False,
        views: Views = "none",
    ) -> RingShape:
        """Return the shape of a case."""
        return cls(
            batch_size=case.batch_size,
            tokens=case.seq_len // ring_degree,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=case.architecture.head_dim,
            ring_degree=ring_degree,
            element=case.element_bytes,
            backend=select_kernels(case).name,
            zigzag=zigzag,
            kept=kept,
            views=views,
        )

    @property
    def q(self) -> int:
        """m."""
        return self.batch_size * self.tokens * self.heads * self.head_dim * self.element

    @property
    def kv(self) -> int:
        """c."""
        return self.batch_size * self.tokens * self.kv_heads * self.head_dim * self.element

    @property
    def lse(self) -> int:
        """l."""
        return self.batch_size * self.tokens * self.heads * 4

    @property
    def wide(self) -> int:
        """f."""
        return 4 // self.element

    def forward_bytes(self) -> int:
        """Return the most that the forward has in use, inputs and outputs included."""
        m, c = self.q, self.kv
        first = 2 * m + 2 * c + self.lse + self._inside(backward=False)
        if self.ring_degree == 1:
            return first
        keys = self.tokens // 2 if self.zigzag else self.tokens
        later = (2 + self.wide) * m + self._blocks() + 2 * self.lse
        return max(first + 2 * c, later + self._inside(keys=keys, backward=False))

    def backward_bytes(self) -> int:
        """Return the most that the backward has in use, inputs and gradients included."""
        m, c = self.q, self.kv
        held = (4 if self.views == "none" else 2) * m
        first = held + 4 * c + self.lse + self._inside(backward=True)
        if self.ring_degree == 1:
            return first
        later = held + self.wide * m + self._blocks() + 4 * self.wide * c + self.lse
        half = self.tokens // 2
        if not self.zigzag:
            return max(first + 2 * c, later + 2 * c + self._inside(backward=True))
        return max(
            first + 2 * c,
            later + c + self._inside(keys=half, backward=True),
            later - m // 2 + 2 * c + self._inside(queries=half, backward=True),
        )

    def _blocks(self) -> int:
        """K/V at hand, arriving, and the caller's own."""
        return (4 if self.ring_degree > 2 else 2) * self.kv + (2 * self.kv if self.kept else 0)

    def _inside(self, *, queries: int | None = None, keys: int | None = None, backward: bool) -> int:
        """A, with a copy of what is not contiguous: rows of a batch of several sequences, columns of wider tensors."""
        q_shape = (self.batch_size, queries or self.tokens, self.heads, self.head_dim)
        k_shape = (self.batch_size, keys or self.tokens, self.kv_heads, self.head_dim)
        inside = scratch_of(self.backend, q_shape, k_shape, self.element, backward=backward)
        if backward and (self.views == "columns" or (queries is not None and self.batch_size > 1)):
            rows = self.q if queries is None else self.q // 2
            inside += rows * (1 if self.backend == "cpu-flash" else 2)
        return inside
