"""Weights of compressed-tensors' layers, in each state of their life."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from longshadow.compress.formats import weight_of

pytest.importorskip("compressed_tensors", reason="needs the extra quant")

from compressed_tensors.compressors import ModelCompressor, compress_module, decompress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams

W4A16 = dict(num_bits=4, strategy="group", group_size=32)
INT8, FLOAT8 = dict(num_bits=8, strategy="channel"), dict(num_bits=8, type="float", strategy="channel")
SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "W4A16": ("compressed-tensors int4 group 32", W4A16, None),
    "W4A16, asymmetric": ("compressed-tensors int4 group 32", W4A16 | dict(symmetric=False), None),
    "W8A16": ("compressed-tensors int8", INT8, None),
    "FP8, weights": ("compressed-tensors float8", FLOAT8, None),
    "W8A8": ("compressed-tensors int8", INT8, dict(num_bits=8, strategy="token", dynamic=True)),
}


def calibrate(model: nn.Module, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> None:
    """Gives all linear layers the scales of the smallest and largest weight of each group."""
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            groups = layer.weight.detach().unflatten(1, (layer.weight_scale.shape[1], -1))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
            layer.weight_scale.data.copy_(scale)
            layer.weight_zero_point.data.copy_(zero)
            layer.quantization_status = QuantizationStatus.FROZEN


def calibrated(weights: dict[str, Any], inputs: dict[str, Any] | None = None, weight: Any = None) -> Any:
    holder = nn.Sequential(nn.Linear(128, 64))
    if weight is not None:
        holder[0].weight.data = weight
    calibrate(holder, weights, inputs)
    return holder[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_state(agrees: Any, scheme: str) -> None:
    name, weights, inputs = SCHEMES[scheme]
    layer = calibrated(weights, inputs)
    options = dict(tolerance=1e-6, probe=1e-6) if inputs is None else dict(tolerance=0.02, kernel="int8_inputs")
    frozen = agrees(layer, name, **options)
    assert not torch.equal(frozen, layer.weight)
    compress_module(layer)
    assert torch.equal(weight_of(layer), frozen)
    assert layer.quantization_status == "compressed"
    decompress_module(layer)
    assert torch.equal(agrees(layer, name, **options), frozen)


def test_two_of_four_with_packed_integers(agrees: Any) -> None:
    weight = torch.randn(64, 32, 4)
    weight.scatter_(2, weight.abs().topk(2, largest=False).indices, 0)
    layer = calibrated(W4A16, weight=weight.flatten(1))
    compress_module(layer)
    read = weight_of(layer)
    assert bool(((read.view_as(weight) == 0).sum(2) >= 2).all())
    decompress_module(layer)
    assert torch.equal(agrees(layer, "compressed-tensors int4 group 32", tolerance=1e-6, probe=1e-6), read)


def test_a_model_is_compensated(model: Any, is_compensated: Any) -> None:
    rounded = copy.deepcopy(model)
    calibrate(rounded, W4A16)
    ModelCompressor.from_pretrained_model(rounded).compress_model(rounded)
    assert "weight_packed" in dict(rounded.model.layers[0].mlp.up_proj.named_parameters())
    is_compensated(model, rounded, "compressed-tensors int4 group 32")
