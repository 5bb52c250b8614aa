"""Shapes by name and from configurations, beside real models; refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from longshadow.engine.planning.reading import SHAPES, read_shape, shape_of
from tests.engine.shadowkv.families import tiny_model

# As their model cards say, in billions.
PUBLISHED_PARAMETERS = {
    "llama-3.1-8b": 8.03,
    "llama-3-8b-1m": 8.03,
    "llama-3.1-70b": 70.6,
    "llama-3.2-1b": 1.24,
    "glm-4-9b-1m": 9.48,
    "yi-9b-200k": 8.83,
    "mistral-7b-v0.3": 7.25,
    "phi-3-mini-128k": 3.82,
    "qwen2.5-7b-1m": 7.62,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-30b-a3b": 30.5,
    "smollm2-135m": 0.135,
}
LLAMA = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
)


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_have_the_published_size(name: str) -> None:
    assert SHAPES[name].num_parameters == pytest.approx(1e9 * PUBLISHED_PARAMETERS[name], rel=0.01)
    assert read_shape(name.upper()) is SHAPES[name]


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma3_text", "phi", "phi3", "glm4", "olmo2", "granite"],
)
def test_a_configuration_gives_the_real_models_sizes(family: str) -> None:
    model = tiny_model(family)
    shape = shape_of(json.loads(model.config.to_json_string(use_diff=False)), family)
    matrices = {id(weight): weight.numel() for weight in model.parameters() if weight.dim() > 1}
    assert shape.num_parameters == sum(matrices.values())
    assert shape.num_sliding_layers == (1 if family == "gemma3_text" else 0)
    assert shape.element_bytes == 4 or model.config.dtype is None


def test_a_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_shape(str(tmp_path)).num_parameters == read_shape(str(tmp_path / "config.json")).num_parameters
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vlm", "text_config": LLAMA}))
    assert read_shape(str(tmp_path)).num_layers == 2, "the language model of a larger one"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(is_encoder_decoder=True), "does not support it: it is an encoder-decoder"),
        (dict(kv_lora_rank=512), "multi-head latent attention"),
        (dict(num_kv_shared_layers=2), "share keys and values"),
        (dict(layer_types=["full_attention", "linear_attention"]), "layers of type 'linear_attention'"),
        (dict(sliding_window=16), "no full-attention layer"),
        (dict(hidden_size=None), "has no number hidden_size"),
        (dict(num_attention_heads=True), "has no number num_attention_heads"),
        (dict(num_key_value_heads=3), "4 heads cannot share 3 KV heads"),
        (dict(vocab_size=0), "vocab_size must be a whole number from 1"),
        (dict(quantization_config={"quant_method": "hqq"}), "quantised as 'hqq'"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape_of({**LLAMA, **changes}, "it")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no shape of that name: known are llama-3\.1-8b, "):
        read_shape("llama-9")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="as JSON"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("quantization", "bits", "number_format"),
    [
        (dict(quant_method="gptq", bits=4, group_size=128), 4 + 20 / 128, "bf16"),
        (dict(quant_method="awq", bits=4, group_size=-1), 4, "bf16"),
        (dict(quant_method="bitsandbytes", load_in_4bit=True), 4.5, "bf16"),
        (dict(quant_method="bitsandbytes", load_in_8bit=True), 8, "int8"),
        (dict(quant_method="mxfp4"), 4.25, "bf16"),
        (dict(quant_method="fp8"), 8, "fp8"),
    ],
)
def test_quantised_weights(quantization: dict[str, Any], bits: float, number_format: str) -> None:
    plain, packed = shape_of(LLAMA, "it"), shape_of({**LLAMA, "quantization_config": quantization}, "it")
    assert packed.weight_format == number_format
    embeddings = 2 * plain.embedding_weights
    assert packed.weight_bytes - embeddings == pytest.approx((plain.weight_bytes - embeddings) * bits / 16, abs=1)


def test_sliding_layers() -> None:
    types = ["sliding_attention", "full_attention"]
    assert shape_of({**LLAMA, "layer_types": types, "sliding_window": 8}, "it").num_full_layers == 1
    assert shape_of({**LLAMA, "sliding_window": 8, "use_sliding_window": False}, "it").num_full_layers == 2
    pattern = {**LLAMA, "num_hidden_layers": 12, "sliding_window": 8, "sliding_window_pattern": 6}
    assert shape_of(pattern, "it").num_full_layers == 2
