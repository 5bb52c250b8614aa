"""Weights of bitsandbytes' layers. In training mode its CPU kernels compute in fp32."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from longshadow.compress.formats import weight_of
from tests.compress.formats.conftest import with_layers

bnb = pytest.importorskip("bitsandbytes", reason="needs the extra quant")

BFLOAT16 = 2.0**-8


def of_4_bits(layer: nn.Linear, kind: str = "nf4", *, nested: bool = False) -> Any:
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None)
    made.weight = bnb.nn.Params4bit(layer.weight.data.clone(), quant_type=kind, compress_statistics=nested, module=made)
    made.bias = layer.bias
    return made.to("cpu")


def of_8_bits(layer: nn.Linear) -> Any:
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False)
    made.bias = layer.bias
    return made.to("cpu")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(agrees: Any, kind: str, nested: bool) -> None:
    original = nn.Linear(128, 64)
    layer = of_4_bits(original, kind, nested=nested)
    weight = agrees(layer.train(), f"bitsandbytes {kind.upper()}", tolerance=1e-6, probe=1e-6)
    assert 0.05 < float((weight - original.weight).norm() / original.weight.norm()) < 0.2


def test_a_layer_that_has_run(agrees: Any) -> None:
    """A CPU with AVX512-BF16 has packed the weight anew, with scales in bf16."""
    layer = of_4_bits(nn.Linear(128, 64)).eval()
    before = weight_of(layer)
    layer(torch.randn(1, 128))
    weight = agrees(layer, "bitsandbytes NF4", tolerance=BFLOAT16, kernel="bfloat16")
    torch.testing.assert_close(weight, before, rtol=4 * BFLOAT16, atol=0)


def test_int8(agrees: Any) -> None:
    layer = of_8_bits(nn.Linear(128, 64))
    agrees(layer.train(), "bitsandbytes int8", tolerance=1e-6, probe=1e-6)
    agrees(layer.eval(), "bitsandbytes int8", tolerance=0.02, kernel="int8_inputs")


def test_int8_with_a_full_weight(agrees: Any) -> None:
    agrees(bnb.nn.Linear8bitLt(128, 64).train(), "bitsandbytes int8", tolerance=1e-6)


def test_what_is_not_quantised_yet_is_refused() -> None:
    with pytest.raises(ValueError, match="move it to a device first"):
        weight_of(bnb.nn.Linear4bit(64, 64))


def test_a_model_is_compensated(model: Any, is_compensated: Any) -> None:
    is_compensated(model, with_layers(copy.deepcopy(model), of_4_bits).eval(), "bitsandbytes NF4")
