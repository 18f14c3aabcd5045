"""The decoder: embedding, blocks, and a head that computes the loss, so that logits are its own business."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpbench.model.block import Block, BlockSettings
from cpbench.model.tiling import TiledLoss, cross_entropy_sum, rms_norm
from cpbench.model_config import ModelConfig


class Embedding(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """`[b, n] -> [b, n, d]`."""
        return functional.embedding(tokens, self.weight)


class LossHead(nn.Module):
    """Final norm, output head and cross-entropy."""

    def __init__(self, config: ModelConfig, settings: BlockSettings) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.settings = settings
        self.norm = nn.Parameter(torch.empty(config.hidden_dim))
        if not config.tied_embeddings:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_dim))

    def forward(self, h: Tensor, labels: Tensor, scale: float, tied: Tensor | None = None) -> Tensor:
        """Return scale x the sum of cross-entropies as a float32 scalar.

        Args:
            h: `[b, n, d]`.
            labels: `[b, n]`.
            scale: factor of the sum.
            tied: the embedding's weight when the model ties them.
        """
        head = self.weight if tied is None else tied
        with self.settings.ctx.recorder.scope("loss"):
            if self.settings.tiles.loss is None:
                logits = functional.linear(rms_norm(h, self.norm, self.eps), head)
                return cross_entropy_sum(logits, labels) * scale
            tile = self.settings.tiles.loss
            return TiledLoss.apply(h, labels, self.eps, tile, scale, self.norm, head)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A Llama-style decoder with a context-parallel method in every block."""

    def __init__(self, config: ModelConfig, settings: BlockSettings) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer, settings) for layer in range(config.num_layers))
        self.head = LossHead(config, settings)

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the parameters in their order, layer by layer: embedding, blocks, head."""
        return [list(part.parameters()) for part in (self.embedding, *self.blocks, self.head)]

    def forward(self, tokens: Tensor, labels: Tensor, scale: float) -> Tensor:
        """Return scale x the sum of cross-entropies over this rank's tokens.

        Args:
            tokens: ids of this rank's tokens, `[b, n]`.
            labels: the ids that follow them, `[b, n]`.
            scale: factor of the sum.
        """
        h = self.embedding(tokens)
        for block in self.blocks:
            h = block(h)
        tied = self.embedding.weight if self.config.tied_embeddings else None
        return self.head(h, labels, scale, tied)  # type: ignore[no-any-return]
