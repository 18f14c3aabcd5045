"""The shape of a Llama-style decoder: presets, parameter and FLOP counts; `cpbench.hugging_face` reads files.

FLOP convention (used for TFLOP/s and MFU everywhere): *model* FLOPs of one training step, so recomputation is not
counted; a matrix product of N parameters costs 2N per token forward and 4N backward; the embedding lookup costs
nothing; causal attention counts half of the full square.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from cpbench.errors import UnknownName, UsageError
from cpbench.hugging_face import read_shape


class ModelConfig(BaseModel):
    """A decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU; if wanted, qk-norm, biases of q, k, v, tied tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_dim: PositiveInt
    """Width of the residual stream, d."""
    num_layers: PositiveInt
    """Number of decoder blocks, L."""
    num_heads: PositiveInt
    """Query heads, H."""
    num_kv_heads: PositiveInt
    """Key/value heads, Hkv; H must be a multiple of it."""
    head_dim: PositiveInt
    """Width of one head, e; attention width is H x e and need not equal hidden_dim."""
    ffn_dim: PositiveInt
    """Inner width of the SwiGLU MLP."""
    vocab_size: PositiveInt
    """Rows of the embedding and of the output head."""
    rope_theta: float = Field(default=500_000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon inside RMSNorm."""
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys before RoPE (Qwen3)."""
    attention_bias: bool = False
    """A bias on each of the projections to queries, keys and values (Qwen2); the output projection has none."""
    tied_embeddings: bool = False
    """The output head shares the embedding's weight."""
    sliding_window: PositiveInt | None = None
    """Keys a query sees at most; None: all before it.  No kernel here has windows: longer sequences are unsupported."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every KV head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs, so it must be even")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        for name in ("attention_bias", "sliding_window"):  # cases from before these fields keep their ids
            if not fields.get(name):
                fields.pop(name, None)
        return fields

    @property
    def attention_dim(self) -> int:
        """Width of all query heads together, H x e."""
        return self.num_heads * self.head_dim

    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of an attention block's parameters, by their names in `cpbench.method.AttentionWeights`."""
        shapes: dict[str, tuple[int, ...]] = {
            "wq": (self.attention_dim, self.hidden_dim),
            "wk": (self.kv_dim, self.hidden_dim),
            "wv": (self.kv_dim, self.hidden_dim),
            "wo": (self.hidden_dim, self.attention_dim),
        }
        if self.qk_norm:
            shapes |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
        if self.attention_bias:
            shapes |= {"bq": (self.attention_dim,), "bk": (self.kv_dim,), "bv": (self.kv_dim,)}
        return shapes

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together, Hkv x e."""
        return self.num_kv_heads * self.head_dim

    @property
    def gqa_ratio(self) -> int:
        """Query heads per KV head, g = H / Hkv."""
        return self.num_heads // self.num_kv_heads

    @property
    def layer_matrix_params(self) -> int:
        """Parameters of one block that take part in matrix products."""
        attention = self.hidden_dim * (2 * self.attention_dim + 2 * self.kv_dim)
        return attention + 3 * self.hidden_dim * self.ffn_dim

    @property
    def num_params(self) -> int:
        """All parameters, embeddings, norms and biases included."""
        vectors = 2 * self.hidden_dim
        vectors += 2 * self.head_dim if self.qk_norm else 0
        vectors += self.attention_dim + 2 * self.kv_dim if self.attention_bias else 0
        tables = self.vocab_size * self.hidden_dim * (1 if self.tied_embeddings else 2)
        return self.num_layers * (self.layer_matrix_params + vectors) + self.hidden_dim + tables

    def step_flops(self, seq_len: int, batch_size: int) -> float:
        """Model FLOPs of one training step over all ranks (convention: see the module docstring).

        Args:
            seq_len: global sequence length S in tokens.
            batch_size: sequences per step.

        Returns:
            6 x (L x layer matrices + head) x S x b  +  6 x L x S^2 x H x e x b.
        """
        tokens = seq_len * batch_size
        matrices = self.num_layers * self.layer_matrix_params + self.vocab_size * self.hidden_dim
        attention = 6.0 * self.num_layers * seq_len * seq_len * self.attention_dim * batch_size
        return 6.0 * matrices * tokens + attention


PRESETS: dict[str, ModelConfig] = {
    "llama3-8b": ModelConfig(
        hidden_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
        vocab_size=128256,
    ),
    "llama3-70b": ModelConfig(
        hidden_dim=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=28672,
        vocab_size=128256,
    ),
    "llama3.2-1b": ModelConfig(
        hidden_dim=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        ffn_dim=8192,
        vocab_size=128256,
        tied_embeddings=True,
    ),
    "qwen3-8b": ModelConfig(
        hidden_dim=4096,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=12288,
        vocab_size=151936,
        rope_theta=1e6,
        norm_eps=1e-6,
        qk_norm=True,
    ),
    "qwen3-32b": ModelConfig(
        hidden_dim=5120,
        num_layers=64,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=25600,
        vocab_size=151936,
        rope_theta=1e6,
        norm_eps=1e-6,
        qk_norm=True,
    ),
    # Small, but with everything the large ones have: GQA 2:1, an FFN that is no power of two, an odd vocabulary.
    "tiny": ModelConfig(
        hidden_dim=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, ffn_dim=688, vocab_size=1021
    ),
}
"""Model presets by name; sources are the models' published `config.json` files."""


def load_model(name: str) -> tuple[str, ModelConfig]:
    """Return (name, config) for a preset, or for the path of a Hugging Face `config.json`.

    Raises:
        UnknownName: neither a preset nor an existing file.
        UsageError: the file cannot be read, or describes what the stack does not have (see `cpbench.hugging_face`).
    """
    if name in PRESETS:
        return name, PRESETS[name]
    path = Path(name)
    if not name.strip():
        raise UnknownName("model", name, PRESETS)
    if path.suffix == ".json" or path.exists():
        path = path / "config.json" if path.is_dir() else path
        return path.parent.name or path.stem, _from_hugging_face(path)
    raise UnknownName("model", name, PRESETS)


def _from_hugging_face(path: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(read_shape(path))
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"model file {path}: {where + ': ' if where else ''}{message}") from error
