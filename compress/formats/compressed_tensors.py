"""compressed-tensors, what llm-compressor writes: integers and floats of few bits, packed or not, pruned or not.

A model is loaded compressed and unpacks itself at its first run. While one is being quantised in memory, its layers
keep the full weight and round it whenever they run. Pruned weights of 2:4 are stored with their zeros. Layers that
round their inputs, too (W8A8), are read like others.
"""

import copy
import importlib
from typing import Any

import torch
from torch import nn

from longshadow.compress.formats.origin import comes_from


def name_of(layer: nn.Module) -> str | None:
    """Such as "compressed-tensors int4 group 128" or "compressed-tensors float8"."""
    scheme: Any = getattr(layer, "quantization_scheme", None)
    if not comes_from(scheme, "compressed_tensors") or scheme.weights is None:
        return None
    kind, size = scheme.weights, scheme.weights.group_size
    number = "float" if kind.type == "float" else "int"
    return f"compressed-tensors {number}{kind.num_bits}" + (f" group {size}" if size and size > 0 else "")


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight [m, n] in fp32; the layer stays compressed if it was."""
    assert isinstance(layer, nn.Linear)
    scheme: Any = layer.quantization_scheme
    if layer.quantization_status == "compressed":
        layer = copy.deepcopy(layer)
        importlib.import_module("compressed_tensors.compressors").decompress_module(layer)
    lifecycle: Any = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    rounded = lifecycle.forward_quantize(layer, layer.weight.data, "weight", scheme.weights)
    return torch.as_tensor(rounded).float()
