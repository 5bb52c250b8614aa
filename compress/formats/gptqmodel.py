"""GPTQ and AWQ in the layers of gptqmodel, which transformers loads such models with."""

from typing import Any

import torch
from torch import nn

from longshadow.compress.blocks import layer_shape
from longshadow.compress.formats.origin import comes_from
from longshadow.compress.formats.probe import ALLOWED_ROUNDING, departure, probed_weight


def name_of(layer: nn.Module) -> str | None:
    """Such as "GPTQ int4 group 128" or "AWQ int4 group 128"."""
    if not comes_from(layer, "gptqmodel") or not hasattr(layer, "qweight"):
        return None
    linear: Any = layer
    [method, *_] = getattr(layer, "SUPPORTS_METHODS", None) or ["gptq"]
    size = getattr(layer, "group_size", -1)
    name = f"{getattr(method, 'value', method).upper()} int{linear.bits}"
    return name + (f" group {size}" if 0 < size < linear.in_features else "")


@torch.no_grad()
def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight [m, n] in fp32: `dequantize_weight` transposed if that is what the layer multiplies by, or probed."""
    weight = _unpacked(layer)
    if weight is not None and departure(layer, weight) < ALLOWED_ROUNDING:
        return weight
    return probed_weight(layer)


def _unpacked(layer: nn.Module) -> torch.Tensor | None:
    # The instance's own may be compiled, which takes a minute and a compiler for a single use.
    dequantize = getattr(type(layer), "dequantize_weight", None)
    if dequantize is None:
        return None
    try:
        weight = torch.as_tensor(dequantize(layer)).float().T.contiguous()
    # Kernels that repack their weight when they first run keep the method, and it fails on what it finds.
    except Exception:
        return None
    return weight if tuple(weight.shape) == layer_shape(layer) else None
