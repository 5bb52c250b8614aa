"""The weight of any linear layer, from what it does to the columns of an identity matrix.

Exact for kernels that quantise weights only, and it is the kernel's own truth, whatever the format stores.
"""

import torch
from torch import nn

CHUNK = 256


@torch.no_grad()
def probed_weight(layer: nn.Module) -> torch.Tensor:
    """W [m, n] in fp32 from layer(e_j) - layer(0), a few hundred unit vectors at a time.

    Raises ValueError where the layer does not say its in_features, or is not linear in its input, such as one that
    quantises activations.
    """
    width = getattr(layer, "in_features", None)
    if not isinstance(width, int):
        raise ValueError(f"{type(layer).__name__} is no linear layer: it has no in_features")
    parameter = next((p for p in layer.parameters() if p.is_floating_point()), None)
    state = [*layer.parameters(), *layer.buffers()]
    blank = torch.zeros(1, width, dtype=torch.float32 if parameter is None else parameter.dtype, device=state[0].device)
    offset = layer(blank).float()
    columns = []
    for start in range(0, width, CHUNK):
        stop = min(start + CHUNK, width)
        units = blank.repeat(stop - start, 1)
        units[torch.arange(stop - start), torch.arange(start, stop)] = 1
        columns.append(layer(units).float() - offset)
    weight = torch.cat(columns).T.contiguous()
    _check_linear(layer, weight, offset, blank)
    return weight


def _check_linear(layer: nn.Module, weight: torch.Tensor, offset: torch.Tensor, blank: torch.Tensor) -> None:
    """On one dense input; the layer's own rounding is allowed."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randn(1, weight.shape[1], generator=generator).to(blank)
    expected = token.float() @ weight.T + offset
    error = float((layer(token).float() - expected).norm() / expected.norm().clamp(min=1e-30))
    if not error < 0.02:
        raise ValueError(
            f"{type(layer).__name__} is not linear in its input (off by {error:.0%}): it quantises activations, and "
            "has no weight to compensate"
        )
