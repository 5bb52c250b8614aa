"""All formats in the order they are asked: the first that knows a layer names it and reads its weight."""

from typing import Protocol

import torch
from torch import nn

from longshadow.compress.formats import (
    bitsandbytes,
    compressed_tensors,
    dense,
    gguf,
    gptqmodel,
    hqq,
    quanto,
    torchao,
)
from longshadow.compress.formats.probe import probed_weight


class Format(Protocol):
    """What each module of a format has. None of them imports its library: a layer of it is there, so it is loaded."""

    def name_of(self, layer: nn.Module) -> str | None:
        """What people call the layer's format, None for a layer of another one."""
        ...

    def weight_of(self, layer: nn.Module) -> torch.Tensor:
        """The weight [m, n] in fp32 of a layer that has a name here."""
        ...


# A layer of compressed-tensors is an nn.Linear, too, so dense ones come last.
FORMATS: tuple[Format, ...] = (bitsandbytes, compressed_tensors, gguf, gptqmodel, hqq, quanto, torchao, dense)


def format_of(layer: nn.Module) -> str:
    """The name of the format that a linear layer's weight is in.

    Such as "bitsandbytes NF4", "torchao int4 group 32" or "dense"; "probed Foo" for a class Foo that no format knows.
    """
    return next((name for known in FORMATS if (name := known.name_of(layer))), f"probed {type(layer).__name__}")


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight [m, n] that a linear layer multiplies by, in fp32.

    That of a known format is read, any other is probed. Where a layer rounds its inputs, too, the weight is still what
    it multiplies the rounded ones by.

    Raises ValueError in one line for what cannot be read: layers that are not linear, or not quantised yet.
    """
    for known in FORMATS:
        if known.name_of(layer):
            return known.weight_of(layer)
    return probed_weight(layer)
