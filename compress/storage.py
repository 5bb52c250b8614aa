"""The bytes that a weight takes as it is stored, whatever its format."""

import math

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from longshadow.compress.blocks import layer_shape


def stored_bits_per_weight(layers: list[nn.Module]) -> float | None:
    """Bits of all tensors of linear layers, scales and offsets included, per weight.

    None where layers keep ordinary floating-point weights: then what a file would keep of them is not to be seen.
    """
    if all(type(layer) is nn.Linear and is_plain(layer.weight) for layer in layers):
        return None
    weights = sum(math.prod(layer_shape(layer)) for layer in layers)
    stored = sum(
        stored_bytes(value)
        for layer in layers
        for name, value in layer.state_dict().items()
        if isinstance(value, torch.Tensor) and name != "bias"
    )
    return 8 * stored / weights


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is an ordinary floating-point tensor, rather than a library's own kind."""
    return weight.is_floating_point() and not is_traceable_wrapper_subclass(weight)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of all tensors that a library's own kind is made of."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
