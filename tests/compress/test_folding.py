"""Scales that a quantiser folded into other layers are found, and models without relation refused."""

import copy
from typing import Any

import pytest
import torch

from longshadow import compensate
from longshadow.compress.calls import Call
from longshadow.compress.folding import norm_scale, unfolded
from tests.compress.test_pipeline import divergence, round_to_nearest, with_factors
from tests.model_zoo import tiny_model as zoo_model
from tests.tiny_models import tiny_model


def fold(model: Any, *, seed: int = 0) -> Any:
    """The same function, with scales moved from norms and rows into the columns behind them, as AWQ does."""
    generator = torch.Generator().manual_seed(seed)
    folded = copy.deepcopy(model)

    def scales(width: int) -> torch.Tensor:
        return torch.rand(width, generator=generator) * 3 + 0.25

    with torch.no_grad():
        for block in folded.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm, layers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                scale = scales(len(norm.weight))
                norm.weight /= scale
                for layer in layers:
                    layer.weight *= scale
            scale = scales(len(mlp.up_proj.weight))
            mlp.up_proj.weight /= scale.unsqueeze(1)
            mlp.down_proj.weight *= scale
    return folded


@pytest.mark.parametrize("propagate", ["sequential", "original"])
def test_folded_models_are_compensated(samples: torch.Tensor, propagate: Any) -> None:
    original = tiny_model()
    folded = fold(original)
    torch.testing.assert_close(folded(samples).logits, original(samples).logits, rtol=0, atol=1e-4)
    quantized = round_to_nearest(folded, bits=3)
    whole = compensate(original, quantized, samples, rank=64, dtype=torch.float32, propagate=propagate)
    restored = with_factors(quantized, whole.factors)
    torch.testing.assert_close(restored(samples).logits, original(samples).logits, rtol=0, atol=1e-3)
    partly = with_factors(quantized, compensate(original, quantized, samples, rank=8, propagate=propagate).factors)
    assert divergence(original, partly, samples) < 0.8 * divergence(original, quantized, samples)


def test_nothing_is_found_where_nothing_was_folded() -> None:
    original = tiny_model()
    quantized = round_to_nearest(original, bits=3)
    block, other = original.model.layers[0], quantized.model.layers[0]
    width = original.config.hidden_size
    call = Call(positional=(torch.randn(1, 5, width),), named={})
    assert norm_scale(block.input_layernorm, other.input_layernorm, call, width) is None
    weights = {name: layer.weight.detach() for name, layer in block.mlp.named_children() if name.endswith("proj")}
    rounded = {name: other.mlp.get_submodule(name).weight.detach() for name in weights}
    same, columns = unfolded(weights, rounded, {})
    assert not columns and all(torch.equal(same[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next"])
def test_norms_that_are_gated_or_hold_their_weights_otherwise(name: str) -> None:
    """Scales folded into norms of weight 1 + w, and into a gated one that normalises head by head."""
    original: Any = zoo_model(name)
    folded = copy.deepcopy(original)
    block = folded.model.layers[0]
    linear = block.linear_attn
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        scale = torch.rand(original.config.hidden_size, generator=generator) + 0.5
        block.input_layernorm.weight.copy_((1 + block.input_layernorm.weight) / scale - 1)
        for layer in (layer for layer_name, layer in linear.named_children() if layer_name.startswith("in_proj")):
            layer.weight *= scale
        of_head = torch.rand(len(linear.norm.weight), generator=generator) + 0.5
        linear.norm.weight /= of_head
        linear.out_proj.weight *= of_head.repeat(linear.out_proj.in_features // len(of_head))
    tokens = torch.arange(40).view(2, 20)
    expected = original(tokens).logits
    torch.testing.assert_close(folded(tokens).logits, expected, rtol=0, atol=1e-3)
    quantized = round_to_nearest(folded, bits=4, group=16)
    result = compensate(original, quantized, tokens, rank=128, dtype=torch.float32)
    assert result.layers["model.layers.0.linear_attn.out_proj"].before < 0.05
    actual = with_factors(quantized, result.factors)(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


def test_inputs_of_the_original_are_scaled_to_the_quantised_layers(samples: torch.Tensor) -> None:
    """The error that a first block reports is that of its own inputs, wherever these are taken from."""
    original = tiny_model()
    quantized = round_to_nearest(fold(original), bits=3)
    reports = [
        compensate(original, quantized, samples, rank=4, propagate=propagate).layers
        for propagate in ("quantized", "original")
    ]
    for name in ("self_attn.q_proj", "self_attn.v_proj"):
        first, second = (vars(layers[f"model.layers.0.{name}"]) for layers in reports)
        assert first == pytest.approx(second, rel=1e-4)


def test_rotated_weights_are_refused(samples: torch.Tensor) -> None:
    original = tiny_model()
    rotated = copy.deepcopy(original)
    layer = rotated.get_submodule("model.layers.1.self_attn.o_proj")
    rotation = torch.linalg.qr(torch.randn(layer.in_features, layer.in_features))[0]
    layer.weight.data = layer.weight.data @ rotation
    with pytest.raises(ValueError, match="o_proj of the quantised model is no approximation"):
        compensate(original, rotated, samples)
