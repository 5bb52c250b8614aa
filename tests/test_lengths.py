"""`plan`, `serve`, `LLM` and `generate` give the same longest length for every kind of RoPE."""

from typing import Any

import pytest
from transformers import AutoConfig

from longshadow import LLM
from longshadow.engine.planning.reading import shape_of
from longshadow.lengths import max_positions
from longshadow.models import max_positions as of_configuration
from tests.model_zoo import tiny_model

FACTORS = dict(short_factor=[1.0] * 8, long_factor=[4.0] * 8)
SIZES = dict(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=1024,
    pad_token_id=0,
)


@pytest.mark.parametrize(
    ("family", "rope", "others", "limit"),
    [
        ("llama", dict(rope_type="default"), {}, 1024),
        ("llama", dict(rope_type="linear", factor=4.0), {}, 1024),
        ("llama", dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024), {}, 4096),
        ("llama", dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128), {}, 1024),
        ("llama", dict(rope_type="dynamic", factor=4.0), {}, 1024),
        ("llama", dict(rope_type="longrope", factor=8.0, original_max_position_embeddings=128, **FACTORS), {}, 128),
        ("phi3", dict(rope_type="longrope", **FACTORS), dict(original_max_position_embeddings=128), 128),
    ],
)
def test_every_way_agrees(family: str, rope: dict[str, Any], others: dict[str, Any], limit: int) -> None:
    sizes = {**SIZES, **others, "rope_parameters": dict(rope_theta=1e4, **rope)}
    config = AutoConfig.for_model(family, **sizes)
    assert of_configuration(config) == limit
    for raw in (config.to_dict(), sizes, {**sizes, "rope_scaling": sizes["rope_parameters"], "rope_parameters": None}):
        assert shape_of(raw, "it").max_positions == max_positions(raw) == limit
    with pytest.raises(ValueError, match=f"max_model_len must be at most {limit}"):
        LLM(tiny_model(family, **sizes), max_model_len=limit + 1, device_memory="1G")


def test_some_models_have_no_limit_and_some_have_layers_with_rope_of_their_own() -> None:
    assert max_positions({}) is None
    dynamic, plain = dict(rope_type="dynamic", factor=2.0), dict(rope_type="default")
    assert (
        max_positions(dict(max_position_embeddings=64, rope_parameters=dict(full_attention=dynamic, other=plain))) == 64
    )
    assert max_positions(dict(text_config=dict(max_position_embeddings=64))) == 64
    old = dict(max_position_embeddings=4096, original_max_position_embeddings=64, rope_scaling=dict(type="su"))
    assert max_positions(old) == 64
