"""What tests of formats share: a small model, and how a weight that was read is judged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from longshadow import compensate
from longshadow.compress.blocks import compensated, decoder_blocks, linear_layers
from longshadow.compress.formats import format_of, probed_weight, weight_of

VOCABULARY = 96
RANK = 8


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A random Llama of two blocks, whose sizes are multiples of 64: bitsandbytes has blocks of that length."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def agrees(record_property: Callable[[str, Any], None]) -> Callable[..., torch.Tensor]:
    """Checks a layer's weight by what the layer's own kernel computes from it, and returns it."""

    @torch.no_grad()
    def check(
        layer: Any,
        name: str,
        *,
        tolerance: float,
        probe: float | None = None,
        dtype: torch.dtype = torch.float32,
        kernel: str = "",
    ) -> torch.Tensor:
        assert format_of(layer) == name
        weight = weight_of(layer)
        assert weight.dtype == torch.float32 and list(weight.shape) == [layer.out_features, layer.in_features]
        tokens = torch.randn(33, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
        bias = 0 if layer.bias is None else layer.bias.float()
        outputs = layer(tokens).float() - bias
        error = float((outputs - tokens.float() @ weight.T).norm() / outputs.norm())
        record_property("format", name)
        record_property(f"largest_error_{kernel or str(dtype).removeprefix('torch.')}", f"{error:.1e}")
        assert error <= tolerance
        if probe is not None:
            torch.testing.assert_close(probed_weight(layer), weight, rtol=0, atol=probe * float(weight.abs().max()))
        return weight

    return check


@pytest.fixture
def is_compensated(record_property: Callable[[str, Any], None]) -> Callable[..., None]:
    """Checks that factors bring a quantised model's distributions nearer to the original's."""

    def check(original: nn.Module, quantized: nn.Module, *formats: str) -> None:
        samples = torch.randint(VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(2))
        names = {format_of(layer) for block in decoder_blocks(quantized) for layer in linear_layers(block).values()}
        assert names == set(formats)
        before = _divergence(original, quantized, samples)
        factors = compensate(original, quantized, samples, rank=RANK).factors
        assert len(factors) == 2 * 7
        layers = {
            name: (quantized.get_submodule(name), pair.lora_b.float(), pair.lora_a.float())
            for name, pair in factors.items()
        }
        with compensated(layers):
            left = _divergence(original, quantized, samples) / before
        record_property("format", formats[0])
        record_property("divergence_left", f"{left:.2f}")
        assert left < 0.9

    return check


def with_layers(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with each linear layer of its blocks replaced by what is made of it."""
    for block in decoder_blocks(model):
        for name, layer in linear_layers(block).items():
            assert isinstance(layer, nn.Linear)
            block.set_submodule(name, make(layer))
    return model


@torch.no_grad()
def _divergence(original: nn.Module, other: nn.Module, samples: torch.Tensor) -> float:
    """Mean KL of the next token's distribution from the original's."""
    expected, actual = (model(samples).logits.double().log_softmax(-1) for model in (original, other))
    return float((expected.exp() * (expected - actual)).sum(-1).mean())
