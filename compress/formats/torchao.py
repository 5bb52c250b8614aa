"""torchao: ordinary layers whose weight is a subclass of Tensor.

Configurations that round inputs, too (int8 dynamic activations), keep the same kinds of weight. SmoothQuant and AWQ
keep a scale for each input beside the weight, which belongs to it.
"""

import re
from typing import Any

import torch
from torch import nn

from longshadow.compress.formats.origin import comes_from
from longshadow.compress.formats.probe import probed_weight


def name_of(layer: nn.Module) -> str | None:
    """Such as "torchao int4 group 32" or "torchao float8"."""
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or not comes_from(weight, "torchao"):
        return None
    block: Any = getattr(weight, "block_size", None)
    in_groups = isinstance(block, (list, tuple)) and len(block) == 2 and 1 < block[1] < weight.shape[1]
    return f"torchao {_kind_of(weight)}" + (f" group {block[1]}" if in_groups else "")


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight [m, n] in fp32; a kind that is packed for one kernel and cannot be read back is probed."""
    weight: Any = layer.weight
    # Every tensor has a `dequantize`; it works for the kinds that bring one, with the fields of torchao's base class.
    if type(weight).dequantize is torch.Tensor.dequantize or not hasattr(weight, "tensor_data_names"):
        return probed_weight(layer)
    values = torch.as_tensor(weight.dequantize()).detach().float()
    input_scales = getattr(weight, "act_pre_scale", None)
    return values if input_scales is None else values * input_scales.float()


def _kind_of(weight: Any) -> str:
    """ "int4" of an IntxUnpackedToInt8Tensor of torch.int4, and of an Int4TilePackedTo4dTensor."""
    if hasattr(weight, "target_dtype"):
        return str(weight.target_dtype).removeprefix("torch.")
    name = type(weight).__name__.removesuffix("Tensor")
    beginning = re.match(r"[A-Za-z]+\d+", name)
    return (beginning[0] if beginning else name).lower()
