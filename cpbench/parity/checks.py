"""The checks of one attention block: reference, recomputation, causality, permuted heads, bytes sent.

causality         tokens from a position on are changed, and no output before it may change by a bit; and of an output
                  gradient that is zero from that position on, nothing may reach an input from there on.
permuted heads    KV heads and the query heads of each are put into another order, in all weights and biases alike: the
                  output stays, and the gradients are in the new order.
bytes sent        collectives of the real run, by kind, the most of any rank, equal `costs` to the byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpbench.model.seeded import stream_id
from cpbench.model_config import ModelConfig
from cpbench.parity.block import Block, BlockRun, Surroundings
from cpbench.parity.limits import Limits, exact
from cpbench.parity.reference import relative_error
from cpbench.runtime.collectives import CollectiveLog
from cpbench.verification import Check, Kind


def against_reference(
    errors: dict[str, float], limits: Limits, surroundings: Surroundings = "plain"
) -> list[Check]:
    """Judge the relative errors of output and all gradients against the reference."""
    suffix = "" if surroundings == "plain" else f" ({surroundings})"
    return [
        limits.check(_kind(name), name + suffix, error, what=name, where="block")
        for name, error in errors.items()
    ]


def against_permuted(block: Block, inputs: dict[str, Tensor], run: BlockRun, limits: Limits) -> list[Check]:
    """Run the block with its heads in another order and compare with the run in the first one."""
    a = block.case.architecture
    order = _head_order(a, block.case.seed)
    permuted = block.run(_permute(inputs, a, order, prefix=""))
    if block.ranks.rank:
        return []
    wanted = _permute(run.tensors, a, order, prefix="d")
    return [
        limits.check(
            "permutation",
            f"{name} (heads permuted)",
            relative_error(permuted.tensors[name], wanted[name]),
            what=name,
            where="block",
            runs=2,
        )
        for name in wanted
    ]


def causality(block: Block, inputs: dict[str, Tensor]) -> list[Check]:
    """Look for influence of later tokens on earlier outputs, forward and backward."""
    s = block.case.seq_len
    drawn = stream_id(block.case.seed, "parity/position") % s
    before = block.local_output(inputs)
    forward = 0.0
    for position in sorted({s // 2, max(1, drawn)}):
        changed = dict(inputs)
        changed["x"] = inputs["x"].clone()
        changed["x"][:, position:] += 1
        difference = (block.local_output(changed) - before).abs()
        forward = max(forward, _largest(difference[:, block.positions < position]))
    dout = inputs["dout"].clone()
    dout[:, s // 2 :] = 0
    dx = block.local_input_gradient(inputs, dout)
    backward = _largest(dx[:, block.positions >= s // 2].abs())
    return [
        exact("causality", "causality", block.ranks.largest(forward)),
        exact("causality", "causality (backward)", block.ranks.largest(backward)),
    ]


def sent(block: Block, run: BlockRun) -> tuple[list[Check], dict[str, int], dict[str, int]]:
    """Compare the bytes of each kind of collective with `costs`; return (checks, forward bytes, backward bytes)."""
    costs = block.method.costs(block.case)
    forward = block.ranks.largest_of_each(run.forward.bytes)
    backward = block.ranks.largest_of_each(run.backward.bytes)
    checks = [
        _sent("sent (forward)", run.forward, forward, costs.forward_collective_bytes),
        _sent("sent (backward)", run.backward, backward, costs.backward_collective_bytes),
    ]
    return checks, forward, backward


def _sent(name: str, log: CollectiveLog, counted: dict[str, int], stated: dict[str, int]) -> Check:
    error = 0.0
    for kind in {*counted, *stated}:
        ours, theirs = counted.get(kind, 0), stated.get(kind, 0)
        error = max(error, abs(ours - theirs) / max(ours, theirs, 1))
    detail = f"counted {_bytes(counted)}, costs state {_bytes(stated)}"
    if log.unknown:
        detail, error = f"collectives of unknown size: {', '.join(dict.fromkeys(log.unknown))}", float("inf")
    return exact("sent", name, error, detail)


def _bytes(by_kind: dict[str, int]) -> str:
    return ", ".join(f"{kind} {size}" for kind, size in sorted(by_kind.items())) or "nothing"


def _largest(t: Tensor) -> float:
    return float(t.max()) if t.numel() else 0.0


def _kind(name: str) -> Kind:
    return "out" if name == "out" else "gradients"


def _head_order(a: ModelConfig, seed: int) -> Tensor:
    """A random order of KV heads, and of the query heads of each: `[k, g]` old query heads."""
    generator = torch.Generator().manual_seed(stream_id(seed, "parity/heads") % 2**63)
    kv = torch.randperm(a.num_kv_heads, generator=generator)
    queries = [torch.randperm(a.gqa_ratio, generator=generator) for _ in range(a.num_kv_heads)]
    return kv[:, None] * a.gqa_ratio + torch.stack(queries)


def _permute(tensors: dict[str, Tensor], a: ModelConfig, order: Tensor, *, prefix: str) -> dict[str, Tensor]:
    """Put the heads of weights and biases, or of their gradients, into an order; everything else stays."""
    queries, keys = order.flatten(), order[:, 0] // a.gqa_ratio
    made = dict(tensors)
    for which, heads in (("q", queries), ("k", keys), ("v", keys)):
        for name in (f"{prefix}w{which}", f"{prefix}b{which}"):
            if name in tensors:
                made[name] = tensors[name].unflatten(0, (-1, a.head_dim))[heads].flatten(0, 1)
    made[prefix + "wo"] = tensors[prefix + "wo"].unflatten(1, (-1, a.head_dim))[:, queries].flatten(1)
    return made
