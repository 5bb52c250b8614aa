"""Weights of quanto's layers."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

quanto = pytest.importorskip("optimum.quanto", reason="needs the extra quant")


def quantized(weights: str, *, dtype: torch.dtype = torch.float32, frozen: bool = True, **options: Any) -> Any:
    holder = nn.Sequential(nn.Linear(256, 64, dtype=dtype))
    quanto.quantize(holder, weights=weights, **options)
    if frozen:
        quanto.freeze(holder)
    return holder[0]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("qint2", "quanto int2 group 128"),
        ("qint4", "quanto int4 group 128"),
        ("qint8", "quanto int8"),
        ("qfloat8_e4m3fn", "quanto float8_e4m3fn"),
    ],
)
def test_weights_only(agrees: Any, weights: str, name: str, frozen: bool) -> None:
    agrees(quantized(weights, frozen=frozen), name, tolerance=1e-6, probe=1e-6)


def test_the_kernel_for_bf16(agrees: Any) -> None:
    layer = quantized("qint4", dtype=torch.bfloat16)
    agrees(layer, "quanto int4 group 128", tolerance=0.01, probe=2.0**-7, dtype=torch.bfloat16)


def test_inputs_and_outputs_of_int8(agrees: Any) -> None:
    holder = nn.Sequential(nn.Linear(256, 64))
    quanto.quantize(holder, weights="qint8", activations="qint8")
    with quanto.Calibration(), torch.no_grad():
        holder(torch.randn(256, 256))
    quanto.freeze(holder)
    agrees(holder[0], "quanto int8", tolerance=0.03, kernel="int8_inputs")


def test_a_model_is_compensated(model: Any, is_compensated: Any) -> None:
    rounded = copy.deepcopy(model)
    quanto.quantize(rounded.model.layers, weights="qint4")
    quanto.freeze(rounded.model.layers)
    is_compensated(model, rounded, "quanto int4 group 128", "quanto int4")
