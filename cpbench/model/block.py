"""One decoder block: x + attention(norm(x)), then h + swiglu(norm(h)), with full checkpointing written by hand.

Checkpointed, a block keeps its input only (in host memory if inputs are offloaded).  Its backward recomputes the
attention once, then runs the MLP's backward straight from h, tile by tile, so the MLP's forward is computed twice in
all (a checkpoint around a tiled MLP computes it three times), and reuses storages: h lives in the attention output,
gradients of the residual stream in the incoming gradient.

An offloaded input is fetched twice: for the recomputation, and again for the norm's backward, so that it is not on the
device while the attention's backward is, where a step has its peak.  The input of the block before it is fetched
beside that norm's backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from cpbench.method import ATTENTION_WEIGHTS, AttentionWeights, Method
from cpbench.model.tiling import (
    TiledMlp,
    TiledNorm,
    Tiles,
    mlp_backward_into,
    mlp_tiled_,
    norm_backward_into,
    norm_tiled,
    rms_norm,
    swiglu,
)
from cpbench.model_config import ModelConfig
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.host_pool import HostPool, Stored
from cpbench.runtime.memo import Memo

_MLP = 1 + len(ATTENTION_WEIGHTS)
"""Where the MLP's parameters begin among those of a block; the norm's comes first."""


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """What surrounds the method in every block."""

    method: Method
    ctx: AttentionContext
    tiles: Tiles
    checkpoint: bool
    inputs: HostPool | None
    """Where checkpointed inputs wait; None keeps them on the device."""
    waiting: list[Stored]
    """Inputs of earlier blocks, in order, so that backward can prefetch the next it needs."""
    save_attention: int = 0
    """The first so many blocks keep their attention output in host memory and do not recompute it."""


class Block(nn.Module):
    """A decoder block with parameters made on the current default device."""

    def __init__(self, config: ModelConfig, layer: int, settings: BlockSettings) -> None:
        super().__init__()
        c = config
        self.layer = layer
        self.eps = c.norm_eps
        self.settings = settings
        self.attention_norm = nn.Parameter(torch.empty(c.hidden_dim))
        self.wq = nn.Parameter(torch.empty(c.attention_dim, c.hidden_dim))
        self.wk = nn.Parameter(torch.empty(c.kv_dim, c.hidden_dim))
        self.wv = nn.Parameter(torch.empty(c.kv_dim, c.hidden_dim))
        self.wo = nn.Parameter(torch.empty(c.hidden_dim, c.attention_dim))
        if c.qk_norm:
            self.q_norm = nn.Parameter(torch.empty(c.head_dim))
            self.k_norm = nn.Parameter(torch.empty(c.head_dim))
        if c.attention_bias:
            self.bq = nn.Parameter(torch.empty(c.attention_dim))
            self.bk = nn.Parameter(torch.empty(c.kv_dim))
            self.bv = nn.Parameter(torch.empty(c.kv_dim))
        self.mlp_norm = nn.Parameter(torch.empty(c.hidden_dim))
        self.gate = nn.Parameter(torch.empty(c.ffn_dim, c.hidden_dim))
        self.up = nn.Parameter(torch.empty(c.ffn_dim, c.hidden_dim))
        self.down = nn.Parameter(torch.empty(c.hidden_dim, c.ffn_dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[b, n, d] -> [b, n, d]`."""
        settings = self.settings
        mlp = (self.mlp_norm, self.gate, self.up, self.down)
        if settings.checkpoint:
            return _Checkpointed.apply(x, self, self.attention_norm, *self._attention(), *mlp)  # type: ignore[no-any-return]
        recorder = settings.ctx.recorder
        with recorder.scope("norm"):
            tile = settings.tiles.norm
            if tile is None:
                normed = rms_norm(x, self.attention_norm, self.eps)
            else:
                normed = TiledNorm.apply(x, self.attention_norm, self.eps, tile)
        h = x + _Attention.apply(normed, self, *self._attention())
        with recorder.scope("mlp"):
            if settings.tiles.mlp is None:
                return torch.add(h, swiglu(rms_norm(h, mlp[0], self.eps), *mlp[1:]))
            return TiledMlp.apply(h, self.eps, settings.tiles.mlp, *mlp)  # type: ignore[no-any-return]

    def _attention(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name, None) for name in ATTENTION_WEIGHTS)


class _AttentionGraph:
    """A method's own autograd graph between detached ends, so that its forward and backward are separate regions."""

    def __init__(
        self, block: Block, normed: Tensor, weights: Sequence[Tensor | None], memo: Memo | None = None
    ) -> None:
        self.block = block
        ctx = replace(block.settings.ctx, memo=memo)
        recorder = block.settings.ctx.recorder
        with torch.enable_grad(), recorder.scope(f"attention:{block.layer}"):
            x = normed.detach().requires_grad_()
            leaves = [None if w is None else w.detach().requires_grad_() for w in weights]
            y = block.settings.method.attention(x, AttentionWeights.of(leaves), ctx)
            recorder.mark("attention_output", y)
        self.output: Tensor | None = y.detach()
        self._edge = get_gradient_edge(y)
        self._inputs = [x, *(leaf for leaf in leaves if leaf is not None)]
        self._present = [leaf is not None for leaf in leaves]

    def backward(self, dy: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradients of the normalised input and of the weights."""
        recorder = self.block.settings.ctx.recorder
        with recorder.scope(f"attention:{self.block.layer}"):
            dx, *grads = torch.autograd.grad([self._edge], self._inputs, [dy])
            recorder.mark("attention_input_gradient", dx)
            recorder.mark("weight_gradient", *grads)
        self._inputs = []
        found = iter(grads)
        return dx, [next(found) if present else None for present in self._present]


class _Attention(torch.autograd.Function):
    """The method without checkpointing; its graph is kept from forward to backward."""

    @staticmethod
    def forward(node: Any, normed: Tensor, block: Block, *weights: Tensor | None) -> Tensor:  # noqa: ANN401
        graph = _AttentionGraph(block, normed, weights)
        output, graph.output = graph.output, None
        node.graph = graph
        if output is None:
            raise AssertionError("a new graph holds its output")
        return output

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> Any:  # noqa: ANN401 - autograd's signature
        graph: _AttentionGraph = node.graph
        node.graph = None
        dx, weights = graph.backward(grads[0])
        return (dx, None, *weights)


class _Checkpointed(torch.autograd.Function):
    """A whole block that keeps its input only."""

    @staticmethod
    def forward(node: Any, x: Tensor, block: Block, *weights: Tensor | None) -> Tensor:  # noqa: ANN401
        settings, recorder = block.settings, block.settings.ctx.recorder
        norm, attention, mlp = weights[0], weights[1:_MLP], weights[_MLP:]
        if settings.inputs is None:
            node.kept = x
        else:
            with recorder.scope("offload"):
                node.kept = settings.inputs.store(x)
            settings.waiting.append(node.kept)
        node.block, node.weights = block, weights
        node.memo = Memo(settings.ctx.host, save_attention=block.layer < settings.save_attention)
        ctx = replace(settings.ctx, memo=node.memo)
        with recorder.scope("norm"):
            normed = norm_tiled(x, norm, block.eps, settings.tiles.norm)  # type: ignore[arg-type]
        with recorder.scope(f"attention:{block.layer}"):
            h = settings.method.attention(normed, AttentionWeights.of(attention), ctx)
            recorder.mark("attention_output", h)
        del normed
        h += x
        with recorder.scope("mlp"):
            return mlp_tiled_(h, mlp, block.eps, settings.tiles.mlp)  # type: ignore[arg-type]

    @staticmethod
    def backward(node: Any, *grads: Tensor) -> Any:  # noqa: ANN401 - autograd's signature
        block: Block = node.block
        settings, recorder = block.settings, block.settings.ctx.recorder
        weights, node.weights = node.weights, None
        norm, attention, mlp = weights[0], weights[1:_MLP], weights[_MLP:]
        # The only consumer of this block's output was the next block, so its gradient is ours to overwrite.
        (dh,) = grads
        kept, node.kept = node.kept, None
        memo, node.memo = node.memo, None
        memo.recomputing = True
        x = _read_input(kept, settings)
        with recorder.scope("norm"):
            normed = norm_tiled(x, norm, block.eps, settings.tiles.norm)
        graph = _AttentionGraph(block, normed, attention, memo)
        del normed
        h, graph.output = graph.output, None
        if h is None:
            raise AssertionError("a new graph holds its output")
        h += x
        del x
        with recorder.scope("mlp"):
            mlp_grads = mlp_backward_into(dh, h, mlp, block.eps, settings.tiles.mlp)
            recorder.mark("weight_gradient", *mlp_grads)
        del h
        dnormed, attention_grads = graph.backward(dh)
        del graph
        x = _take_input(kept, settings)
        with recorder.scope("norm"):
            norm_grad = norm_backward_into(dh, dnormed, x, norm, block.eps, settings.tiles.norm)
        return (dh, None, norm_grad, *attention_grads, *mlp_grads)


def _read_input(kept: Tensor | Stored, settings: BlockSettings) -> Tensor:
    """A block's input on the device; in host memory it stays there too."""
    if isinstance(kept, Tensor):
        return kept
    with settings.ctx.recorder.scope("offload"):
        return settings.ctx.host.read(kept)


def _take_input(kept: Tensor | Stored, settings: BlockSettings) -> Tensor:
    """Give up a block's input, and start to fetch that of the block before it."""
    if isinstance(kept, Tensor):
        return kept
    settings.waiting.remove(kept)
    with settings.ctx.recorder.scope("offload"):
        x = settings.ctx.host.fetch(kept)
        if settings.waiting:
            settings.ctx.host.prefetch(settings.waiting[-1])
    return x
