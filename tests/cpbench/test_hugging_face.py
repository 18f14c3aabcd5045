"""Models from `config.json`: every family's public files are read, and what the stack does not have is named."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cpbench.cli import app
from cpbench.errors import UsageError
from cpbench.model_config import PRESETS, ModelConfig, load_model

FILES = Path(__file__).parent / "model_files"
"""Written from what the models' publishers state of them."""


def changed(folder: Path, **changes: object) -> Path:
    """A Llama config with changes; Ellipsis takes a key away."""
    raw = json.loads((FILES / "llama-3.1-8b" / "config.json").read_text(encoding="utf-8")) | changes
    path = folder / "config.json"
    path.write_text(
        json.dumps({key: value for key, value in raw.items() if value is not ...}), encoding="utf-8"
    )
    return path


def read(name: str) -> ModelConfig:
    return load_model(str(FILES / name))[1]


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("llama-3.1-8b", "llama3-8b"),
        ("llama-3.2-1b", "llama3.2-1b"),
        ("qwen3-8b", "qwen3-8b"),
        ("qwen3-32b", "qwen3-32b"),
    ],
)
def test_a_public_file_is_the_preset(name: str, preset: str) -> None:
    """Llama 3 with scaled RoPE, with tied embeddings, and Qwen3 with qk-norm: the same shape as the preset."""
    assert read(name) == PRESETS[preset]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.738),
        ("llama-3.1-8b", 8.030),
        ("llama-3.2-1b", 1.236),
        ("qwen3-8b", 8.191),
        ("qwen3-0.6b-new-format", 0.596),
        ("mistral-7b-v0.3", 7.248),
        ("mistral-7b-v0.1", 7.242),
        ("mistral-nemo-12b", 12.248),
        ("qwen2.5-7b", 7.616),
        ("qwen2.5-0.5b", 0.494),
    ],
)
def test_parameters_are_as_many_as_published(name: str, billions: float) -> None:
    """The number of parameters that each model is known to have."""
    assert read(name).num_params / 1e9 == pytest.approx(billions, abs=0.001)


def test_what_files_spell_in_their_own_way() -> None:
    """A head wider than hidden / heads, RoPE's base in rope_parameters, every head its own KV head, default base."""
    assert read("mistral-nemo-12b").attention_dim == 4096
    assert read("qwen3-0.6b-new-format").rope_theta == 1e6
    assert read("qwen3-0.6b-new-format").head_dim == 128
    assert read("llama-2-7b").gqa_ratio == 1
    assert read("llama-2-7b").rope_theta == 10_000.0
    assert load_model(str(FILES / "qwen3-8b" / "config.json"))[0] == "qwen3-8b"


@pytest.mark.parametrize("said", [..., None, True])
def test_qwen2_has_biases_whether_or_not_its_file_says_so(tmp_path: Path, said: object) -> None:
    """Of q, k and v; no other family has them, and each bias is counted among the parameters."""
    qwen = load_model(str(changed(tmp_path, model_type="qwen2", attention_bias=said)))[1]
    llama = PRESETS["llama3-8b"]

    assert qwen.attention_bias
    assert not any(model.attention_bias for model in PRESETS.values())
    assert qwen.num_params - llama.num_params == 32 * (4096 + 2 * 1024)
    assert read("qwen2.5-0.5b").tied_embeddings
    assert not read("qwen2.5-7b").tied_embeddings


def test_a_family_that_the_stack_does_not_have_is_refused() -> None:
    """Mixtral for its experts; the message names the file."""
    with pytest.raises(UsageError, match="mixtures of experts") as caught:
        read("mixtral-8x7b")

    assert "mixtral-8x7b" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "is not one of llama, mistral, qwen2, qwen3"),
        ({"model_type": ...}, "null is not one of"),
        ({"model_type": "qwen3_moe"}, "mixtures of experts"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only ...ForCausalLM"),
        (
            {"attention_bias": True},
            "attention_bias=true is not supported for llama; only false is: elsewhere",
        ),
        ({"model_type": "mistral", "attention_bias": True}, "not supported for mistral"),
        ({"model_type": "qwen3", "attention_bias": True}, "the output projection would have one too"),
        ({"model_type": "qwen2", "attention_bias": False}, "only true is: its q, k and v always have biases"),
        ({"qkv_bias": True}, "qkv_bias=true"),
        ({"attention_bias": "yes"}, 'attention_bias="yes"'),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_scaling": {"type": "mrope"}}, '"mrope" is not one of'),
        ({"rope_scaling": 8}, "rope_scaling=8 is no object"),
        ({"layer_types": ["linear_attention"]}, '"linear_attention" is not supported'),
        ({"layer_types": "full"}, "is no list"),
        ({"hidden_size": ...}, "lacks the key 'hidden_size'"),
        ({"hidden_size": "4096"}, "no positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_attention_heads": True}, "num_attention_heads=true"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_attention_heads": 33}, "not a multiple of num_attention_heads=33"),
        ({"num_key_value_heads": 5}, "not a multiple of num_kv_heads=5"),
        ({"head_dim": 127}, "head_dim=127 is odd"),
        ({"rope_theta": -1}, "rope_theta=-1 is no positive number"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps="),
        ({"tie_word_embeddings": "no"}, "neither true nor false"),
        ({"use_sliding_window": 1}, "use_sliding_window=1 is neither"),
        ({"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers=-1 is no whole number"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """Each key that would change memory, work or meaning is refused with its value and what is supported."""
    with pytest.raises(UsageError) as caught:
        load_model(str(changed(tmp_path, **changes)))

    assert words in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"torch_dtype": "float16"},
        {"dtype": "float32", "torch_dtype": ...},
        {"attention_bias": None, "hidden_act": None},
        {"max_position_embeddings": 2048, "pretraining_tp": 2},
        {"num_local_experts": 1},
    ],
)
def test_what_changes_neither_memory_nor_work_is_left_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Scaled frequencies, the dtype of a checkpoint, nulls, and keys for inference give the same shape."""
    assert load_model(str(changed(tmp_path, **changes)))[1] == PRESETS["llama3-8b"]


def test_a_window_is_kept_where_it_is_used(tmp_path: Path) -> None:
    """Mistral's is its number, or its default where the file does not say; Qwen's only if it is switched on."""
    qwen = {"model_type": "qwen3", "sliding_window": 4096}

    assert read("mistral-7b-v0.1").sliding_window == 4096
    assert read("mistral-7b-v0.3").sliding_window is None
    assert load_model(str(changed(tmp_path, model_type="mistral")))[1].sliding_window == 4096
    assert load_model(str(changed(tmp_path, **qwen)))[1].sliding_window is None
    assert load_model(str(changed(tmp_path, use_sliding_window=True, **qwen)))[1].sliding_window == 4096
    assert (
        load_model(str(changed(tmp_path, layer_types=["sliding_attention"], **qwen)))[1].sliding_window
        == 4096
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("layers", "full", "types", "window"),
    [
        (32, ..., ..., 4096),
        (28, ..., ..., None),
        (32, 31, ..., 4096),
        (32, 32, ..., None),
        (32, 0, ..., 4096),
        (32, 0, ["full_attention"], None),
        (32, 32, ["full_attention", "sliding_attention"], 4096),
    ],
)
def test_a_window_that_no_layer_has_is_none(
    tmp_path: Path, family: str, layers: int, full: object, types: object, window: int | None
) -> None:
    """Qwen's first `max_window_layers` layers, 28 if not given, see all keys; a list of the layers says it better."""
    path = changed(
        tmp_path,
        model_type=family,
        attention_bias=None,
        num_hidden_layers=layers,
        use_sliding_window=True,
        sliding_window=4096,
        max_window_layers=full,
        layer_types=types,
    )

    assert load_model(str(path))[1].sliding_window == window


def test_a_width_of_null_is_no_window(tmp_path: Path) -> None:
    """Even where windows are switched on; without the key the families' default counts."""
    on = {"model_type": "qwen3", "use_sliding_window": True}

    assert load_model(str(changed(tmp_path, sliding_window=None, **on)))[1].sliding_window is None
    assert load_model(str(changed(tmp_path, **on)))[1].sliding_window == 4096


def test_the_shape_is_written_without_what_is_not_there() -> None:
    """So cases from before windows and biases keep their ids; what is there is part of the case."""
    assert "sliding_window" not in PRESETS["llama3-8b"].model_dump(mode="json")
    assert "attention_bias" not in PRESETS["llama3-8b"].model_dump(mode="json")
    assert read("qwen2.5-7b").model_dump(mode="json")["attention_bias"] is True
    assert ModelConfig.model_validate(read("qwen2.5-7b").model_dump()) == read("qwen2.5-7b")
    assert read("mistral-7b-v0.1").model_dump(mode="json")["sliding_window"] == 4096
    assert ModelConfig.model_validate(read("mistral-7b-v0.1").model_dump()) == read("mistral-7b-v0.1")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_KEYS = sorted(json.loads((FILES / "qwen3-0.6b-new-format" / "config.json").read_text(encoding="utf-8")))


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(_KEYS), value=_JSON)
def test_any_value_of_any_key_is_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: object
) -> None:
    """No value makes the reader fail in another way."""
    raw = json.loads((FILES / "qwen3-0.6b-new-format" / "config.json").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("any") / "config.json"
    path.write_text(json.dumps(raw | {key: value}), encoding="utf-8")

    found = None
    with suppress(UsageError):
        found = load_model(str(path))[1]

    assert found is None or found.num_params > 0


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1e999}', "[" * 5000])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    """An empty file, a list, half an object and deep nesting."""
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(UsageError):
        load_model(str(path))


def planned(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sweep", *arguments, "--mode", "estimate", "--dry-run", "--json"])
    return result.exit_code, result.output


def test_the_command_line_takes_files_and_says_what_it_cannot() -> None:
    """A sweep plans public files by folder or path, a case that is longer than the window is unsupported."""
    names = ("llama-3.1-8b", "mistral-7b-v0.1/config.json", "qwen2.5-7b")
    files = ",".join(str(FILES / name) for name in names)

    code, output = planned("--method", "ulysses", "--model", files, "--seqlen", "4K,8K", "--world", "4")

    assert code == 0
    cases = json.loads(output)["cases"]
    assert [case["case_id"].split("-")[1] for case in cases] == ["4K", "8K"] * 3
    assert [case["unsupported"] is None for case in cases] == [True, True, True, False, True, True]
    assert "longer than the model's sliding_window=4096" in cases[3]["unsupported"]


def test_the_command_line_refuses_a_file_with_exit_code_2() -> None:
    """Mixtral's experts: wrong usage, in one line."""
    code, output = planned("--model", str(FILES / "mixtral-8x7b"), "--seqlen", "4K")

    assert code == 2
    assert "mixtures of experts" in " ".join(output.split())
