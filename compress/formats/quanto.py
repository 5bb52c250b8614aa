"""quanto (optimum-quanto): integers of 2, 4 and 8 bits, and float8. Layers may round their inputs and outputs, too."""

from typing import Any

import torch
from torch import nn

from longshadow.compress.formats.origin import comes_from


def name_of(layer: nn.Module) -> str | None:
    """Such as "quanto int4 group 128" or "quanto float8_e4m3fn"; None where only activations are quantised."""
    kind: Any = getattr(layer, "weight_qtype", None)
    if kind is None or not comes_from(layer, "optimum.quanto"):
        return None
    size = layer.weight_group_size
    return f"quanto {kind.name.removeprefix('q')}" + (f" group {size}" if size else "")


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight [m, n] in fp32; one that is not frozen is rounded first, as it is in each run."""
    linear: Any = layer
    with torch.no_grad():
        return torch.as_tensor(linear.qweight.dequantize()).detach().float()
