"""Reads the shape of a decoder from a Hugging Face `config.json`; what the stack does not compute is refused by name.

Families: Llama, Mistral, Qwen2 and Qwen3, where their layers are what the stack has (RMSNorm, RoPE over the whole head,
grouped-query attention, SwiGLU).  Everything that changes memory or work is mapped or refused:

    biases                        of q, k and v, which every Qwen2 has, kept; attention_bias of the other families
                                  refused, because it gives the output projection one too; mlp_bias refused
    experts, quantised weights    refused
    other activations, dropout    refused
    partial rotary embedding      refused
    sliding window                kept if any layer has one; a case is unsupported where its sequence is longer
    rope_scaling, rope_parameters the base is taken; scaled frequencies (llama3, yarn, ...) change neither memory nor
                                  work, so they are left out
    dtype, torch_dtype            left out: the case's dtype decides

A key that is missing has the family's own default.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpbench.errors import UsageError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_WINDOW = 4096  # of a config that does not say how wide
_FULL_LAYERS = 28
"""Layers before the first with a window, of a Qwen2 or Qwen3 config that does not say."""
_QWEN3_HEAD_DIM = 128
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_ONLY: tuple[tuple[str, Any, str], ...] = (
    ("mlp_bias", False, "the MLP of the stack has no biases"),
    ("attention_dropout", 0, "no attention kernel here has dropout"),
    ("hidden_act", "silu", "the MLP of the stack is SwiGLU"),
    ("partial_rotary_factor", 1, "RoPE turns the whole head here"),
    ("rope_interleaved", False, "RoPE turns halves of a head here"),
    ("quantization_config", None, "the stack trains weights in bfloat16 or float32"),
    ("is_encoder_decoder", False, "only decoders are trained here"),
)
"""Key, the one value that is supported, and why."""


def read_shape(path: Path) -> dict[str, Any]:
    """Return the fields of a `ModelConfig` from a file.

    Raises:
        UsageError: it cannot be read, lacks a key, has a value of a wrong kind, or wants what the stack does not have.
    """
    raw = _read(path)
    try:
        return _shape(raw)
    except KeyError as error:
        raise UsageError(f"model file {path} lacks the key {error.args[0]!r}") from error
    except ValueError as error:
        raise UsageError(f"model file {path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"model file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"model file {path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"model file {path} holds no JSON object")
    return raw


def _shape(raw: dict[str, Any]) -> dict[str, Any]:
    """ValueError says what is not supported, KeyError which key is missing."""
    family = _family(raw)
    for key, only, why in _ONLY:
        value = raw.get(key, only)
        if value is not None and value != only:
            raise ValueError(f"{key}={_short(value)} is not supported; only {json.dumps(only)} is: {why}")
    heads, hidden = _count(raw, "num_attention_heads"), _count(raw, "hidden_size")
    return {
        "hidden_dim": hidden,
        "num_layers": _count(raw, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": _count(raw, "num_key_value_heads", heads),
        "head_dim": _head_dim(raw, family, hidden, heads),
        "ffn_dim": _count(raw, "intermediate_size"),
        "vocab_size": _count(raw, "vocab_size"),
        "rope_theta": _rope_theta(raw),
        "norm_eps": _number(raw, "rms_norm_eps", 1e-6),
        "qk_norm": family == "qwen3",
        "attention_bias": _attention_bias(raw, family),
        "tied_embeddings": _switch(raw, "tie_word_embeddings"),
        "sliding_window": _window(raw, family),
    }


def _family(raw: dict[str, Any]) -> str:
    family = raw.get("model_type")
    experts = [key for key in _EXPERTS if raw.get(key) not in (None, 0, 1)]
    if experts or (isinstance(family, str) and ("moe" in family or family == "mixtral")):
        given = f"{experts[0]}={_short(raw[experts[0]])}" if experts else f"model_type {family!r}"
        raise ValueError(f"{given}: mixtures of experts are not supported; the MLP of the stack is dense")
    if family not in FAMILIES:
        raise ValueError(f"model_type {_short(family)} is not one of {', '.join(FAMILIES)}")
    named = raw.get("architectures") or []
    if not isinstance(named, list) or not all(
        isinstance(name, str) and name.endswith("ForCausalLM") for name in named
    ):
        raise ValueError(f"architectures={_short(named)} is not supported; only ...ForCausalLM is")
    return str(family)


def _attention_bias(raw: dict[str, Any], family: str) -> bool:
    """Whether q, k and v have biases and the output projection none, the one kind that the stack has."""
    has = family == "qwen2"
    why = (
        "its q, k and v always have biases"
        if has
        else "elsewhere the output projection would have one too, and in the stack only q, k and v can, as in qwen2"
    )
    for key in ("attention_bias", "qkv_bias"):
        value = raw.get(key)
        if value is not None and value is not has:
            raise ValueError(
                f"{key}={_short(value)} is not supported for {family}; only {json.dumps(has)} is: {why}"
            )
    return has


def _head_dim(raw: dict[str, Any], family: str, hidden: int, heads: int) -> int:
    if raw.get("head_dim") is None and family != "qwen3" and hidden % heads:
        raise ValueError(
            f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}; give head_dim"
        )
    return _count(raw, "head_dim", _QWEN3_HEAD_DIM if family == "qwen3" else hidden // heads)


def _rope_theta(raw: dict[str, Any]) -> float:
    """The base of RoPE; newer files have it in rope_parameters."""
    inside: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{key}={_short(value)} is no object")
        kind = value.get("rope_type", value.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ValueError(f"{key} of type {_short(kind)} is not one of {', '.join(ROPE_TYPES)}")
        if value.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(
                f"partial_rotary_factor={_short(value['partial_rotary_factor'])} is not supported; only 1 is: "
                "RoPE turns the whole head here"
            )
        inside |= value
    return _number(raw if raw.get("rope_theta") is not None else inside, "rope_theta", 10_000.0)


def _window(raw: dict[str, Any], family: str) -> int | None:
    """Keys a query sees at most, in any layer; None if all before it."""
    types = raw.get("layer_types") or []
    if not isinstance(types, list):
        raise ValueError(f"layer_types={_short(types)} is no list")
    other = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
    if other:
        raise ValueError(f"a layer of type {_short(other[0])} is not supported")
    switched, said = _switch(raw, "use_sliding_window"), raw.get("sliding_window", _WINDOW) is not None
    if family == "mistral":
        used = said
    elif types:
        used = "sliding_attention" in types
    else:
        used = switched and said and _full_layers(raw, family) < _count(raw, "num_hidden_layers")
    return _count(raw, "sliding_window", _WINDOW) if used else None


def _full_layers(raw: dict[str, Any], family: str) -> int:
    """Layers before the first with a window."""
    key = "max_window_layers"
    value = raw.get(key)
    if value is None:
        return _FULL_LAYERS if family in ("qwen2", "qwen3") else 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key}={_short(value)} is no whole number of layers")
    return value


def _count(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; without a default the key must be there."""
    value = raw[key] if default is None else raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}={_short(value)} is no positive whole number")
    return value


def _number(raw: dict[str, Any], key: str, default: float) -> float:
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{key}={_short(value)} is no positive number")
    return float(value)


def _switch(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key}={_short(value)} is neither true nor false")
    return bool(value)


def _short(value: Any) -> str:  # noqa: ANN401 - any JSON value
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."
