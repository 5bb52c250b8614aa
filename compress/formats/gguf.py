"""GGUF blocks, where transformers leaves them packed: on devices that it has a kernel for.

Elsewhere, and for `longshadow.models.load_model` everywhere, a GGUF file is unpacked when it is loaded; its layers are
dense then.
"""

from typing import Any

import torch
from torch import nn

from longshadow.compress.formats.origin import comes_from


def name_of(layer: nn.Module) -> str | None:
    """Such as "GGUF Q4_K"."""
    if type(layer).__name__ != "GgufLinear" or not comes_from(layer, "transformers"):
        return None
    return f"GGUF {_type_of(layer).name}"


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight [m, n] in fp32. Raises ValueError for a type that the package gguf cannot unpack."""
    from gguf import quants

    assert isinstance(layer.weight, torch.Tensor)
    try:
        values = quants.dequantize(layer.weight.detach().cpu().numpy(), _type_of(layer))
    except NotImplementedError as error:
        raise ValueError(f"the package gguf cannot unpack {_type_of(layer).name}") from error
    weight = torch.from_numpy(values).to(layer.weight.device)
    order = layer.input_permutation  # of the inputs, before they meet the columns
    return weight[:, order.argsort()] if isinstance(order, torch.Tensor) else weight


def _type_of(layer: nn.Module) -> Any:
    from gguf import GGMLQuantizationType

    kind: Any = layer.ggml_type
    return GGMLQuantizationType(kind)
