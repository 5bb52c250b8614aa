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
    method = "AWQ" if "awq" in type(layer).__name__.lower() else "GPTQ"
    size = linear.group_size
    return f"{method} int{linear.bits}" + (f" group {size}" if 0 < size < linear.in_features else "")


@torch.no_grad()
def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight [m, n] in fp32.

    What `dequantize_weight` gives is [n, m]. Many kernels have none, or inherit it but repack what it reads when a
    model is loaded; their layers, which do not multiply by it, are probed.
    """
    # The instance's own may be compiled, which takes a minute and a compiler for a single use.
    dequantize = getattr(type(layer), "dequantize_weight", None)
    if dequantize is not None:
        weight = torch.as_tensor(dequantize(layer)).float().T.contiguous()
        if tuple(weight.shape) == layer_shape(layer) and departure(layer, weight) < ALLOWED_ROUNDING:
            return weight
    return probed_weight(layer)
