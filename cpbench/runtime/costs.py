"""Byte counts of the tensors that cost formulas are written in."""

from __future__ import annotations

from dataclasses import dataclass

from cpbench.case import Case

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class HeadBytes:
    """Bytes of tensors over `tokens` tokens with all heads, in the case's dtype."""

    q: int
    """All query heads, M = b tokens H e bytes-per-element."""
    kv: int
    """All KV heads, K = M Hkv / H."""
    element: int
    """Bytes of one element."""

    @classmethod
    def of(cls, case: Case, *, tokens: int) -> HeadBytes:
        """Return the sizes for a number of tokens (local or global) of every sequence in the batch."""
        a, element = case.architecture, _ELEMENT_BYTES[case.dtype]
        rows = case.batch_size * tokens
        return cls(
            q=rows * a.attention_dim * element,
            kv=rows * a.kv_dim * element,
            element=element,
        )


def sent(size: int, ranks: int) -> int:
    """Bytes one rank sends to others in an all-to-all of `size` bytes over `ranks` ranks."""
    return size * (ranks - 1) // ranks
