"""Layers that keep an ordinary weight: fake-quantised, pruned, unpacked when they were loaded, or never quantised."""

import torch
from torch import nn

# A weight of eight bits has its scales elsewhere.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def name_of(layer: nn.Module) -> str | None:
    """ "dense" for a plain layer with a plain weight; libraries hide others in subclasses of either."""
    if type(layer) is not nn.Linear or type(layer.weight) not in (nn.Parameter, torch.Tensor):
        return None
    return "dense" if layer.weight.dtype in DTYPES else None


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight [m, n] itself, in fp32."""
    assert isinstance(layer.weight, torch.Tensor)
    return layer.weight.detach().float()
