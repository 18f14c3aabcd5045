"""What a checkpointed block computes, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cpbench import registry
from cpbench.case import STACKS, Case
from cpbench.model import tiling
from cpbench.model.block import Block, BlockSettings
from cpbench.model.tiling import Tiles
from cpbench.model_config import ModelConfig
from cpbench.runtime import kernels as kernel_module
from cpbench.runtime.collectives import Group
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.host_pool import HostPool
from cpbench.runtime.kernels import Kernels, select_kernels
from cpbench.runtime.recorder import Recorder
from cpbench.runtime.rope import Rope
from cpbench.runtime.streams import Streams

TOKENS, HIDDEN, LAYERS = 44, 24, 3


def chain(
    method_name: str, *, tile: int | None, save_attention: int = 0, offload: bool = True
) -> tuple[list[Block], HostPool]:
    """Blocks in a row on one rank, checkpointed, with the same weights every time."""
    model = ModelConfig(
        hidden_dim=HIDDEN,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=40,
        vocab_size=31,
        attention_bias=True,
    )
    case = Case(
        method=method_name,
        model="block",
        architecture=model,
        seq_len=TOKENS,
        world_size=1,
        dtype="float32",
        stack=STACKS["long" if offload else "checkpoint"],
    )
    method = registry.load(method_name, {})
    device, recorder, one = torch.device("cpu"), Recorder(), Group(size=1, rank=0)
    host = HostPool(device, Streams(device), recorder)
    ctx = AttentionContext(
        case=case,
        ulysses=one,
        ring=one,
        kernels=select_kernels(case),
        rope=Rope(method.layout(case, 0).segments, model.rope_theta),
        recorder=recorder,
        host=host,
    )
    settings = BlockSettings(
        method=method,
        ctx=ctx,
        tiles=Tiles(norm=tile, mlp=tile),
        checkpoint=True,
        inputs=host if offload else None,
        waiting=[],
        save_attention=save_attention,
    )
    torch.manual_seed(0)
    blocks = [Block(model, layer, settings) for layer in range(LAYERS)]
    for parameter in (p for block in blocks for p in block.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return blocks, host


def train(blocks: list[Block]) -> list[Tensor]:
    """Run forward and backward; return the output and every gradient."""
    torch.manual_seed(1)
    x = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    h = x
    for block in blocks:
        h = block(h)
    (h * torch.randn_like(h)).sum().backward()
    found = [h, x.grad, *(p.grad for block in blocks for p in block.parameters())]
    return [t.detach() for t in found if t is not None]


@pytest.mark.parametrize("tile", [None, 16])
def test_the_forward_of_the_mlp_is_computed_twice(tile: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once forward and once in backward, tiled or not; a checkpoint around a tiled MLP would make it three times."""
    tokens = 0
    real = tiling.swiglu

    def counting(x: Tensor, *weights: Tensor) -> Tensor:
        nonlocal tokens
        tokens += x.shape[1]
        return real(x, *weights)

    monkeypatch.setattr(tiling, "swiglu", counting)
    train(chain("ulysses", tile=tile)[0])

    assert tokens == 2 * LAYERS * TOKENS


@pytest.mark.parametrize("method", ["single", "ulysses", "ring", "upipe", "usp", "fpdt"])
@pytest.mark.parametrize("saved", [0, 1, LAYERS])
def test_saved_attention_is_not_computed_again(
    method: str, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that keep their attention output run its forward once, the others twice; results are bit-identical."""
    forwards = 0
    real = Kernels.forward

    def counting(self: Kernels, *args: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        nonlocal forwards
        forwards += 1
        return real(self, *args, causal=causal, scale=scale)

    monkeypatch.setattr(kernel_module.Kernels, "forward", counting)
    plain = train(chain(method, tile=16)[0])
    once, forwards = forwards // (2 * LAYERS), 0
    saving = train(chain(method, tile=16, save_attention=saved)[0])

    assert forwards == once * (2 * LAYERS - saved)
    for ours, theirs in zip(saving, plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["ulysses", "offload", "upipe", "fpdt"])
def test_host_memory_does_not_grow_from_step_to_step(method: str) -> None:
    """Every slab comes back: three steps hold no more than the first."""
    blocks, host = chain(method, tile=16, save_attention=1)
    train(blocks)
    first = host.peak_bytes
    for _ in range(2):
        train(blocks)

    assert host.peak_bytes == first > 0


def test_offloaded_inputs_change_nothing() -> None:
    """A block whose input waits on the host gives the same bits as one that keeps it on the device."""
    for ours, theirs in zip(
        train(chain("upipe", tile=16)[0]), train(chain("upipe", tile=16, offload=False)[0]), strict=True
    ):
        assert torch.equal(ours, theirs)
