"""Weights of layers that torchao quantised."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchao", reason="needs the extra quant")

from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.prototype.smoothquant import SmoothQuantConfig
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
    to_nf4,
)

WEIGHT_ONLY = {
    "torchao int8": Int8WeightOnlyConfig(),
    "torchao int8 group 32": Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "torchao int4 group 32": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "torchao int2 group 64": IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=PerGroup(64)),
    "torchao float8": Float8WeightOnlyConfig(),
}
WITH_ACTIVATIONS = {
    "torchao int8": Int8DynamicActivationInt8WeightConfig(),
    "torchao int4 group 32": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
}


def quantized(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    holder = nn.Sequential(nn.Linear(128, 64, dtype=dtype))
    quantize_(holder, config)
    return holder[0]


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weights_only(agrees: Any, name: str) -> None:
    agrees(quantized(WEIGHT_ONLY[name]), name, tolerance=1e-6, probe=1e-6)


@pytest.mark.parametrize("name", WITH_ACTIVATIONS)
def test_inputs_of_int8(agrees: Any, name: str) -> None:
    agrees(quantized(WITH_ACTIVATIONS[name]), name, tolerance=0.02, kernel="int8_inputs")


def test_a_weight_packed_for_one_kernel(agrees: Any) -> None:
    layer = quantized(PrototypeInt4WeightOnlyConfig(group_size=32), torch.bfloat16)
    agrees(layer, "torchao int4 group 32", tolerance=0.01, dtype=torch.bfloat16)


def test_nf4(agrees: Any) -> None:
    layer = nn.Linear(128, 64)
    layer.weight = nn.Parameter(to_nf4(layer.weight.data, 64, 16), requires_grad=False)
    agrees(layer, "torchao nf4", tolerance=1e-6)


def test_smoothed_inputs(agrees: Any) -> None:
    """Their scales belong to the weight."""
    original = nn.Linear(128, 64)
    holder = nn.Sequential(copy.deepcopy(original))
    base = Int8DynamicActivationInt8WeightConfig()
    quantize_(holder, SmoothQuantConfig(base_config=base, step="prepare"))
    holder(torch.randn(64, 128) * torch.linspace(0.1, 10, 128))
    quantize_(holder, SmoothQuantConfig(base_config=base, step="convert"))
    weight = agrees(holder[0], "torchao int8", tolerance=0.03, kernel="int8_inputs")
    assert float((weight - original.weight).norm() / original.weight.norm()) < 0.02


def test_a_model_is_compensated(model: Any, is_compensated: Any) -> None:
    name = "torchao int4 group 32"
    rounded = copy.deepcopy(model)
    quantize_(rounded.model.layers, WEIGHT_ONLY[name])
    is_compensated(model, rounded, name)
