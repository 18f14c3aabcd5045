"""Copies of KV heads for a Ulysses degree that they do not divide over, as activations and never as weights."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor


def replicas(num_kv_heads: int, degree: int) -> int:
    """Return how many copies each KV head needs so that the copies divide over `degree` ranks.

    The copies number lcm(num_kv_heads, degree); since query heads are a multiple of both, they still divide evenly
    over the copies, in order: copy c of head j serves a contiguous run of j's query heads.
    """
    return degree // gcd(num_kv_heads, degree)


def replicate_heads(t: Tensor, copies: int) -> Tensor:
    """Return `[b, n, k, e] -> [b, n, k*copies, e]`, copies of a head side by side; `t` itself for one copy."""
    return t if copies == 1 else t.repeat_interleave(copies, dim=2)


def sum_replicas(grad: Tensor, copies: int) -> Tensor:
    """Undo `replicate_heads` for gradients: sum over the copies of each head, in float32."""
    if copies == 1:
        return grad
    b, n, heads, e = grad.shape
    return grad.view(b, n, heads // copies, copies, e).sum(dim=3, dtype=torch.float32).to(grad.dtype)
