"""Planned bytes beside those of real caches, part by part; the peak of a machine."""

import json
from functools import cache
from typing import Any

import pytest
import torch

from longshadow.engine.planning.layout import lay_out
from longshadow.engine.planning.memory import (
    activation_bytes,
    demand,
    full_cache_bytes,
    sequence_memory,
)
from longshadow.engine.planning.model_shape import ModelShape
from longshadow.engine.planning.reading import SHAPES, shape_of
from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig
from tests.engine.shadowkv.families import tiny_model

SMALL = dict(rank=10, budget_tokens=24, num_outlier_chunks=2, local_tokens=8, dense_threshold=0, resident_factor=1)
LLAMA = SHAPES["llama-3.1-8b"]


@cache
def loaded(family: str, dtype: torch.dtype) -> Any:
    model = tiny_model(family).to(dtype)  # type: ignore[arg-type]
    model.config.dtype = dtype
    return model


def planned_and_real(
    family: str, dtype: torch.dtype, config: ShadowKVConfig, num_prompt: int, num_new: int
) -> tuple[Any, Any]:
    model = loaded(family, dtype)
    shape = shape_of(json.loads(model.config.to_json_string(use_diff=False)), family)
    with ShadowKVCache.for_model(model, config) as cache, torch.inference_mode():
        model(torch.ones(1, num_prompt, dtype=torch.long), past_key_values=cache)
        for _ in range(num_new):
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        real = cache.memory()
    return sequence_memory(shape, config, lay_out(config, shape.key_width, num_prompt, num_new)), real


@pytest.mark.parametrize(
    ("changes", "num_prompt", "num_new"),
    [
        ({}, 200, 1),
        ({}, 203, 70),  # a tail that grows
        (dict(segment_tokens=64), 200, 70),  # segments of generated tokens
        (dict(resident_factor=0), 200, 2),
        (dict(resident_factor=1.5), 200, 2),
        (dict(candidate_factor=1, num_sink_chunks=0, query_weighted=False), 200, 2),
        (dict(value_dtype="int8", factor_dtype="int8"), 200, 2),
        (dict(value_dtype="int8", factor_dtype="int8", value_store="device"), 200, 2),
        (dict(value_store="device", factor_dtype="fp8"), 200, 2),
        (dict(key_store="exact", value_dtype="int8"), 200, 2),
        (dict(budget_tokens=4000), 200, 2),  # more than there is
        (dict(dense_threshold=None), 200, 3),  # stays exact
        (dict(dense_threshold=205), 200, 9),  # becomes a segment while generating
    ],
)
def test_bytes_are_those_of_a_real_cache(changes: dict[str, Any], num_prompt: int, num_new: int) -> None:
    config = ShadowKVConfig(**{**SMALL, **changes})
    planned, real = planned_and_real("llama", torch.bfloat16, config, num_prompt, num_new)
    assert (planned.device, planned.host) == (real.device, real.host)


@pytest.mark.parametrize("family", ["phi", "gemma3_text", "qwen3", "glm4"])
def test_families(family: str) -> None:
    planned, real = planned_and_real(family, torch.float32, ShadowKVConfig(**SMALL), 200, 2)
    assert (planned.device, planned.host) == (real.device, real.host)
    assert ("stock layers" in planned.device) == (family == "gemma3_text")


def test_ranks_that_depend_on_the_keys_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match="plan with a fixed rank"):
        lay_out(ShadowKVConfig(rank_energy=0.9), 32, 2000, 1)


def test_bytes_per_token_of_a_large_model() -> None:
    """Device bytes per token and layer, as `bench/tables/memory.py` measures them, and the rotation of all layers."""
    for factor_dtype, expected in ((None, 576), ("int8", 296)):
        config = ShadowKVConfig(factor_dtype=factor_dtype, budget_tokens=1024)
        short, long = (
            sequence_memory(LLAMA, config, lay_out(config, LLAMA.key_width, tokens, 1)) for tokens in (32_768, 65_536)
        )
        slope = {part: (long.device[part] - short.device[part]) / 32_768 for part in long.device}
        assert (slope["factors"] + slope["landmarks"]) / LLAMA.num_layers == expected
        assert slope["rotation"] == 2 * 64 * 2
        assert slope["tail"] == slope["resident"] == slope["basis"] == 0
        assert (long.host_bytes - short.host_bytes) / 32_768 / LLAMA.num_layers == 2048


def machine(config: ShadowKVConfig | None, batch: int, chunk: int | None = None) -> Any:
    return demand(LLAMA, config, num_prompt_tokens=40_960, num_new_tokens=64, batch=batch, prefill_chunk_size=chunk)


@pytest.mark.parametrize("config", [None, ShadowKVConfig(), ShadowKVConfig(value_store="device")])
def test_each_sequence_adds_its_cache(config: ShadowKVConfig | None) -> None:
    one, two, five = (machine(config, batch) for batch in (1, 2, 5))
    if config is None:
        device, host = full_cache_bytes(LLAMA, 41_024), 0
    else:
        own = sequence_memory(LLAMA, config, lay_out(config, LLAMA.key_width, 40_960, 64))
        device, host = own.device_bytes, own.host_bytes
    assert two.device_bytes - one.device_bytes == (five.device_bytes - two.device_bytes) / 3 == device
    assert two.host_bytes - one.host_bytes == (five.host_bytes - two.host_bytes) / 3 == host


def test_the_peak_is_the_last_prompt() -> None:
    config = ShadowKVConfig()
    own = sequence_memory(LLAMA, config, lay_out(config, LLAMA.key_width, 40_960, 64))
    layer = 40_960 * 2 * 1024 * 2
    assert activation_bytes(LLAMA, 1) == 2 * (2 * 4096 + 3 * 14_336)
    whole = LLAMA.weight_bytes + own.device_bytes + 40_960 * 102_400 + layer
    assert machine(config, 1).device_bytes == whole
    chunks = LLAMA.weight_bytes + own.device_bytes + 8192 * 102_400 + 2 * layer
    assert machine(config, 1, 8192).device_bytes == chunks
    # Four chunks are parked: buffers of 10,240 + 25 % each time they grow; the fifth is not.
    assert machine(config, 1, 8192).host_bytes == 32 * (32_768 + 24_576 // 4) * 4096
    assert machine(None, 1).device_bytes == LLAMA.weight_bytes + 41_024 * 131_072 + 40_960 * 102_400


def test_a_mixture_of_experts_and_sliding_layers() -> None:
    shape = ModelShape(
        name="it",
        num_layers=4,
        hidden_size=64,
        intermediate_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=100,
        rotary_dim=16,
        num_experts=8,
        num_active_experts=2,
        num_sliding_layers=3,
        sliding_window=101,
    )
    assert full_cache_bytes(shape, 1000) == 2 * 32 * 2 * (1000 + 3 * 100)
    assert activation_bytes(shape, 1) == 2 * (2 * 64 + 3 * 64 + 3 * 32)
    assert shape.layer_weights == 2 * 64 * (64 + 32) + 8 * (3 * 64 * 32 + 64)
