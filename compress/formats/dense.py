"""Layers that keep an ordinary weight: fake-quantised, pruned, or never quantised."""

import torch
from torch import nn

from longshadow.compress.formats.probe import probed_weight


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight [m, n] that a linear layer multiplies by, in fp32.

    Ordinary layers are read, others probed. Raises ValueError for layers that are not linear.
    """
    if type(layer) is nn.Linear and layer.weight.is_floating_point():
        return layer.weight.detach().float()
    return probed_weight(layer)
