"""The block around a core: what waits where between forward and backward, with and without checkpointing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cpbench.block_count import count_block
from cpbench.case import STACKS, Case
from cpbench.method import AttentionWeights, Method
from cpbench.model_config import ModelConfig
from cpbench.runtime.collectives import Group
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.host_pool import HostPool, Stored
from cpbench.runtime.kernels import select_kernels
from cpbench.runtime.memo import Memo
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.rope import Rope
from cpbench.runtime.streams import Streams
from methods.offload import Offload
from methods.single import Single
from methods.ulysses import Ulysses

CPU = torch.device("cpu")
TOKENS = 48


class WatchedPool(HostPool):
    """Notes every load when it starts."""

    def __init__(self) -> None:
        super().__init__(CPU, Streams(CPU), Recorder())
        self.loads = 0

    def prefetch(self, stored: Stored) -> None:
        self.loads += stored.fetched is None
        HostPool.prefetch(self, stored)


def case(world_size: int = 1, device: str = "cpu") -> Case:
    model = ModelConfig(
        hidden_dim=40,
        num_layers=1,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        ffn_dim=64,
        vocab_size=64,
        qk_norm=True,
        attention_bias=True,
    )
    return Case.model_validate(
        {
            "method": "offload",
            "model": "small",
            "architecture": model,
            "seq_len": TOKENS,
            "batch_size": 2,
            "world_size": world_size,
            "stack": STACKS["checkpoint"],
            "dtype": "float32" if device == "cpu" else "bfloat16",
            "device": device,
            "mode": "estimate",
        }
    )


def surroundings() -> tuple[AttentionContext, WatchedPool]:
    """One rank without a process group."""
    c, pool = case(), WatchedPool()
    one = Group(size=1, rank=0)
    return (
        AttentionContext(
            case=c,
            ulysses=one,
            ring=one,
            kernels=select_kernels(c),
            rope=Rope(((0, TOKENS),), c.architecture.rope_theta),
            recorder=Recorder(),
            host=pool,
        ),
        pool,
    )


def inputs() -> list[Tensor]:
    """x, the nine weights of an attention block, and the output's gradient."""
    torch.manual_seed(0)
    a = case().architecture
    shapes = [
        (2, TOKENS, a.hidden_dim),
        (a.attention_dim, a.hidden_dim),
        (a.kv_dim, a.hidden_dim),
        (a.kv_dim, a.hidden_dim),
        (a.hidden_dim, a.attention_dim),
        (a.head_dim,),
        (a.head_dim,),
        (a.attention_dim,),
        (a.kv_dim,),
        (a.kv_dim,),
        (2, TOKENS, a.hidden_dim),
    ]
    return [torch.randn(shape) for shape in shapes]


def plain(method: Method, ctx: AttentionContext) -> list[Tensor]:
    """Output and gradients, the graph kept from forward to backward."""
    *tensors, dy = inputs()
    x, *weights = (t.requires_grad_() for t in tensors)
    y = method.attention(x, AttentionWeights(*weights), ctx)
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], dy)]


def checkpointed(method: Method, ctx: AttentionContext) -> list[Tensor]:
    """Output and gradients of a block that is recomputed, as a checkpointed stack does."""
    memo = Memo(ctx.host)
    *tensors, _ = inputs()
    with torch.no_grad():
        x, *weights = tensors
        first = method.attention(x, AttentionWeights(*weights), replace(ctx, memo=memo))
    memo.recomputing = True
    again = plain(method, replace(ctx, memo=memo))
    assert torch.equal(first, again[0])
    return again


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("run", [plain, checkpointed])
def test_what_waited_in_host_memory_gives_the_same_gradients(run: object, prefetch: bool) -> None:
    """Output and every gradient equal, bit for bit, those of a block that kept all on the device."""
    assert callable(run)
    expected = run(Single(), surroundings()[0])

    ours = run(Offload(prefetch=prefetch), surroundings()[0])

    assert [torch.equal(a, b) for a, b in zip(expected, ours, strict=True)] == [True] * 11


@pytest.mark.parametrize(("prefetch", "early"), [(True, 5), (False, 1)])
def test_loads_start_before_the_attention_backward_if_prefetched(prefetch: bool, early: int) -> None:
    """The recomputation of a checkpointed block reads out; prefetching, it starts q, k, v and lse too."""
    ctx, pool = surroundings()
    memo = Memo(pool)
    x, *weights = inputs()[:-1]
    method = Offload(prefetch=prefetch)
    with torch.no_grad():
        method.attention(x, AttentionWeights(*weights), replace(ctx, memo=memo))
    memo.recomputing = True
    assert pool.loads == 0

    y = method.attention(x.requires_grad_(), AttentionWeights(*weights), replace(ctx, memo=memo))

    assert pool.loads == early
    torch.autograd.grad(y.sum(), x)
    assert pool.loads == (5 if prefetch else 6)  # without prefetching, out is read twice


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_block_in_host_memory_recomputes_nothing_and_holds_exactly_what_it_saves(device: str) -> None:
    """The recomputation sends nothing; the pool holds q, k, v with their copies, out and the log-sum-exp."""
    c = case(world_size=4, device=device)
    element = 4 if device == "cpu" else 2
    q = 2 * TOKENS // 4 * 8 * 16 * element
    lse = 2 * TOKENS * 2 * 4

    offload, ulysses = count_block(c, Offload()), count_block(c, Ulysses())

    assert (
        offload.host_bytes == 2 * q + 2 * (q // 2) + lse
    )  # two KV heads over four ranks: two copies of each
    assert offload.recomputation.bytes == {}
    assert ulysses.recomputation.bytes == ulysses.forward.bytes == offload.forward.bytes
    assert ulysses.backward.bytes == offload.backward.bytes


def test_attention_kept_on_the_host_is_not_computed_again() -> None:
    """With `save_attention` any method's recomputation sends nothing, and backward exchanges q, k, v once more."""
    c = case(world_size=4)

    count = count_block(c, Ulysses(), save_attention=True)

    assert count.recomputation.bytes == {}
    q, kv = 2 * TOKENS // 4 * 8 * 16 * 4, 2 * TOKENS // 4 * 4 * 16 * 4
    again = (q + 2 * kv) * 3 // 4
    assert (
        count.backward.bytes["all_to_all"]
        == Ulysses().costs(c).backward_collective_bytes["all_to_all"] + again
    )
