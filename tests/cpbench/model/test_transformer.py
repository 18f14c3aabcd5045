"""The parameters of a whole model: as many as are counted, and where they begin."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from cpbench.model.block import BlockSettings
from cpbench.model.seeded import initialise
from cpbench.model.transformer import Decoder
from cpbench.model_config import PRESETS, ModelConfig, load_model

FILES = Path(__file__).parent.parent / "model_files"


def decoder(config: ModelConfig, device: str) -> Decoder:
    """A model that is never run."""
    with torch.device(device):
        return Decoder(config, cast(BlockSettings, None))


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "mistral-7b-v0.3", "qwen2.5-0.5b", "qwen2.5-7b", "qwen3-8b"]
)
def test_parameters_are_as_many_as_are_counted(name: str) -> None:
    """Tied and untied tables, qk-norm and biases are in the count, to the last one."""
    config = load_model(str(FILES / name))[1]

    parameters = decoder(config, "meta").parameters()

    assert sum(parameter.numel() for parameter in parameters) == config.num_params


def test_biases_do_not_begin_at_zero() -> None:
    """So that a forgotten one changes the loss; norms begin at one."""
    config = PRESETS["tiny"].model_copy(update={"attention_bias": True, "qk_norm": True})
    model = decoder(config, "cpu")

    initialise(model, seed=0, num_layers=config.num_layers)

    found = dict(model.named_parameters())
    for layer in range(config.num_layers):
        for name in ("bq", "bk", "bv"):
            assert found[f"blocks.{layer}.{name}"].std().item() == pytest.approx(0.02, rel=0.2)
        assert torch.equal(found[f"blocks.{layer}.k_norm"], torch.ones(config.head_dim))
    assert not torch.equal(found["blocks.0.bq"], found["blocks.1.bq"])
