"""Weights of HQQ's layers."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from longshadow.compress.formats import weight_of
from tests.compress.formats.conftest import with_layers

quantize = pytest.importorskip("hqq.core.quantize", reason="needs the extra quant")


def quantized(layer: nn.Linear, bits: float = 4, *, axis: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    return quantize.HQQLinear(copy.deepcopy(layer), config, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_all_widths(agrees: Any, bits: int, axis: int) -> None:
    agrees(quantized(nn.Linear(128, 64), bits, axis=axis), f"HQQ int{bits} group 64", tolerance=1e-6, probe=1e-6)


def test_its_default_dtype(agrees: Any) -> None:
    layer = quantized(nn.Linear(128, 64), dtype=torch.float16)
    agrees(layer, "HQQ int4 group 64", tolerance=1e-3, probe=1e-6, dtype=torch.float16)


def test_what_is_not_quantised_yet_is_refused() -> None:
    with pytest.raises(ValueError, match="not quantised yet"):
        weight_of(quantize.HQQLinear(None, None, initialize=False))


def test_a_model_is_compensated(model: Any, is_compensated: Any) -> None:
    is_compensated(model, with_layers(copy.deepcopy(model), quantized), "HQQ int4 group 64")
