"""How many blocks may keep their attention output in host memory (`save_attention`).

A block that keeps it skips the attention forward of its recomputation: 3.5 units of attention work instead of 4.5, up
to 1.29 times faster where attention dominates, for M + L bytes a rank (M: the attention output of the rank's tokens,
L: its float32 log-sum-exp, M / head_dim x 2 in bfloat16).
"""

from __future__ import annotations

from cpbench.case import Case, Stack
from cpbench.errors import Unsupported

_TRANSIENT_LAYERS = 3
"""Attention outputs' worth of host memory left free, for what methods park there within one layer."""


def with_saved_attention(case: Case) -> Stack:
    """Return the case's stack with `save_attention` as a number of blocks and the host budget spent.

    Raises:
        Unsupported: attention is to be saved without checkpointing, more blocks than there are, or `auto` without a
            budget.
    """
    stack, layers = case.stack, case.architecture.num_layers
    wanted = stack.save_attention
    if wanted and stack.checkpoint != "full":
        raise Unsupported(
            f'save_attention={wanted} needs checkpoint = "full": without checkpointing nothing is recomputed'
        )
    if wanted == "auto":
        if stack.host_budget_bytes is None:
            raise Unsupported(
                'save_attention="auto" needs host_budget_bytes, the host memory of a node to fill, '
                'for example host_budget_bytes = "1.5 TiB"'
            )
        wanted = min(layers, blocks_that_fit(case, stack.host_budget_bytes))
    elif wanted > layers:
        raise Unsupported(
            f"save_attention={wanted} is more than the model's {layers} layers; use {layers} or auto"
        )
    return stack.model_copy(update={"save_attention": wanted, "host_budget_bytes": None})


def saved_attention_bytes(case: Case) -> int:
    """Return the host bytes of one block's attention output and log-sum-exp on one rank."""
    a = case.architecture
    rows = case.batch_size * case.tokens_per_rank
    return rows * (a.attention_dim * case.element_bytes + a.num_heads * 4)


def blocks_that_fit(case: Case, budget: int) -> int:
    """Return how many blocks' attention outputs fit a node's budget beside what else the stack keeps there."""
    a, stack = case.architecture, case.stack
    ranks = case.world_size // case.nodes
    rank_budget = budget // ranks
    if stack.offload == "inputs":
        rows = case.batch_size * case.tokens_per_rank
        rank_budget -= a.num_layers * rows * a.hidden_dim * case.element_bytes
    if stack.optimizer_offload:
        rank_budget -= 8 * a.num_params // case.world_size
    return max(0, rank_budget // saved_attention_bytes(case) - _TRANSIENT_LAYERS)
