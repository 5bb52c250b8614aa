"""Shapes by name, or from a transformers config.json, read as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from longshadow.engine.planning.hardware import Format
from longshadow.engine.planning.model_shape import ModelShape
from longshadow.lengths import max_positions, rope_parameters

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"


def _llama(
    name: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **other: Any
) -> ModelShape:
    head_dim = other.pop("head_dim", hidden // heads)
    return ModelShape(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=other.pop("rotary_dim", head_dim),
        **other,
    )


# From the config.json files of the models' public repositories.
SHAPES = {
    shape.name: shape
    for shape in (
        _llama("llama-3.1-8b", 32, 4096, 14_336, 32, 8, vocab_size=128_256, max_positions=131_072),
        _llama("llama-3-8b-1m", 32, 4096, 14_336, 32, 8, vocab_size=128_256, max_positions=1_048_576),
        _llama("llama-3.1-70b", 80, 8192, 28_672, 64, 8, vocab_size=128_256, max_positions=131_072),
        _llama("llama-3.2-1b", 16, 2048, 8192, 32, 8, vocab_size=128_256, max_positions=131_072, tied_embeddings=True),
        _llama("glm-4-9b-1m", 40, 4096, 13_696, 32, 4, vocab_size=151_552, max_positions=1_048_576, rotary_dim=64),
        _llama("yi-9b-200k", 48, 4096, 11_008, 32, 4, vocab_size=64_000, max_positions=262_144),
        _llama("mistral-7b-v0.3", 32, 4096, 14_336, 32, 8, vocab_size=32_768, max_positions=32_768),
        _llama("phi-3-mini-128k", 32, 3072, 8192, 32, 32, vocab_size=32_064, max_positions=4096),
        _llama("qwen2.5-7b-1m", 28, 3584, 18_944, 28, 4, vocab_size=152_064, max_positions=1_010_000),
        _llama(
            "qwen3-4b",
            *(36, 2560, 9728, 32, 8),
            head_dim=128,
            vocab_size=151_936,
            max_positions=40_960,
            tied_embeddings=True,
        ),
        _llama("qwen3-8b", 36, 4096, 12_288, 32, 8, head_dim=128, vocab_size=151_936, max_positions=40_960),
        _llama(
            "qwen3-30b-a3b",
            *(48, 2048, 768, 32, 4),
            head_dim=128,
            vocab_size=151_936,
            max_positions=40_960,
            num_experts=128,
            num_active_experts=8,
        ),
        _llama("smollm2-135m", 30, 576, 1536, 9, 3, vocab_size=49_152, max_positions=8192, tied_embeddings=True),
    )
}


def read_shape(model: str) -> ModelShape:
    """A named shape, or that of a config.json or of a folder with one.

    Raises:
        ValueError: in one line, why there is none.
    """
    if model.lower() in SHAPES:
        return SHAPES[model.lower()]
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}, and no shape of that name: known are {', '.join(SHAPES)}; "
            "for others give a transformers config.json or its folder"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"cannot read {path}: it holds no JSON object")
    return shape_of(config, path.resolve().parent.name)


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a transformers configuration describes.

    Raises:
        ValueError: a size is missing, or ShadowKV does not support the architecture.
    """
    config = {**config, **(config.get("text_config") or {})}
    _check_architecture(config, name)
    num_heads = _size(config, name, "num_attention_heads")
    hidden_size = _size(config, name, "hidden_size")
    head_dim = config.get("head_dim") or hidden_size // num_heads
    num_layers = _size(config, name, "num_hidden_layers")
    partial = config.get("partial_rotary_factor") or rope_parameters(config)[0].get("partial_rotary_factor") or 1.0
    num_experts = next((config[key] for key in ("num_experts", "num_local_experts") if config.get(key)), 1)
    expert_size = config.get("moe_intermediate_size") if num_experts > 1 else None
    model_type = str(config.get("model_type", ""))
    weight_bits, weight_format = _quantization(config, name)
    return ModelShape(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=expert_size or _size(config, name, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        vocab_size=_size(config, name, "vocab_size"),
        rotary_dim=int(head_dim * partial),
        max_positions=max_positions(config),
        tied_embeddings=bool(config.get("tie_word_embeddings", model_type.startswith(("gemma", "cohere")))),
        num_ffn_matrices=2 if model_type == "phi" else 3,
        num_experts=num_experts,
        num_active_experts=config.get("num_experts_per_tok") or config.get("experts_per_token") or 1,
        num_sliding_layers=_num_sliding_layers(config, name, num_layers),
        sliding_window=config.get("sliding_window") or 0,
        element_bytes=4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2,
        weight_bits=weight_bits,
        weight_format=weight_format,
    )


def _refuse(name: str, reason: str) -> NoReturn:
    raise ValueError(f"ShadowKV does not support {name}: {reason}")


def _check_architecture(config: Mapping[str, Any], name: str) -> None:
    if config.get("is_encoder_decoder"):
        _refuse(name, "it is an encoder-decoder")
    if config.get("kv_lora_rank"):
        _refuse(name, "it caches latent vectors (multi-head latent attention), not keys")
    if config.get("num_kv_shared_layers"):
        _refuse(name, "some of its layers share keys and values")


def _size(config: Mapping[str, Any], name: str, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"the configuration of {name} has no number {key}: is it of a transformers language model?")
    return value


def _num_sliding_layers(config: Mapping[str, Any], name: str, num_layers: int) -> int:
    types = config.get("layer_types")
    if types:
        for layer_type in types:
            if layer_type not in (FULL_ATTENTION, SLIDING_ATTENTION):
                _refuse(name, f"it has layers of type {layer_type!r}")
        return int(types.count(SLIDING_ATTENTION))
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return 0
    period = config.get("sliding_window_pattern")
    return num_layers - num_layers // period if period else num_layers


def _quantization(config: Mapping[str, Any], name: str) -> tuple[float | None, Format]:
    """Bits per weight, with what its group's scale adds (None: not quantised), and the format of matrix products."""
    quantization = config.get("quantization_config")
    if not quantization:
        return None, "bf16"
    method = quantization.get("quant_method")
    if method in ("gptq", "awq"):
        bits, group = quantization.get("bits", 4), quantization.get("group_size", 128)
        return bits + ((16 + bits) / group if group > 0 else 0), "bf16"
    if method == "bitsandbytes":
        return (4.5, "bf16") if quantization.get("load_in_4bit") else (8, "int8")
    if method == "mxfp4":
        return 4.25, "bf16"
    if method in ("fp8", "fbgemm_fp8"):
        return 8, "fp8"
    raise ValueError(
        f"{name} is quantised as {method!r}, whose size is not known here: plan with the model before quantisation"
    )
