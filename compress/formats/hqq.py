"""HQQ, half-quadratic quantisation: 1 to 8 bits with a scale and a zero point in groups."""

from typing import Any

import torch
from torch import nn

from longshadow.compress.formats.origin import comes_from


def name_of(layer: nn.Module) -> str | None:
    """Such as "HQQ int4 group 64"."""
    if type(layer).__name__ != "HQQLinear" or not comes_from(layer, "hqq"):
        return None
    meta: Any = layer.meta or {}
    bits, size = meta.get("nbits", ""), meta.get("group_size")
    return f"HQQ int{bits}" + (f" group {size}" if size else "")


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight [m, n] in fp32, as rounded to the layer's compute dtype. Raises ValueError without a weight."""
    linear: Any = layer
    if not linear.ready:
        raise ValueError("HQQLinear is not quantised yet: initialize it, or load its weights")
    return torch.as_tensor(linear.dequantize()).detach().float()
