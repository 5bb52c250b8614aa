"""The weight of any linear layer, from what it does to the columns of an identity matrix.

Exact for kernels that quantise weights only, and it is the kernel's own truth, whatever the format stores.
"""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

CHUNK = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALLOWED_ROUNDING = 0.02


@torch.no_grad()
def probed_weight(layer: nn.Module) -> torch.Tensor:
    """W [m, n] in fp32 from layer(e_j) - layer(0), a few hundred unit vectors at a time.

    Raises ValueError where the layer does not say its in_features, cannot be run, or is not linear in its input, such
    as one that quantises activations.
    """
    width = getattr(layer, "in_features", None)
    if not isinstance(width, int):
        raise ValueError(f"{type(layer).__name__} is no linear layer: it has no in_features")
    columns = []
    with _without_bias(layer):
        blank, offset = _at_zero(layer, width)
        for start in range(0, width, CHUNK):
            stop = min(start + CHUNK, width)
            units = blank.repeat(stop - start, 1)
            units[torch.arange(stop - start), torch.arange(start, stop)] = 1
            columns.append(layer(units).float() - offset)
    weight = torch.cat(columns).T.contiguous()
    error = departure(layer, weight)
    if not error < ALLOWED_ROUNDING:
        raise ValueError(
            f"{type(layer).__name__} is not linear in its input (off by {error:.0%}): it quantises activations, and "
            "has no weight to compensate"
        )
    return weight


@torch.no_grad()
def departure(layer: nn.Module, weight: torch.Tensor) -> float:
    """How far the layer is from multiplying by the weight [m, n], on one dense input; relative to its output."""
    with _without_bias(layer):
        blank, offset = _at_zero(layer, weight.shape[1])
        token = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(blank)
        outputs = layer(token).float() - offset
    expected = token.float() @ weight.T
    return float((outputs - expected).norm() / expected.norm().clamp(min=1e-30))


@contextmanager
def _without_bias(layer: nn.Module) -> Iterator[None]:
    """Within, its bias is zero: in 16 bits a large one would leave nothing of small weights."""
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, torch.Tensor):
        yield
        return
    kept = bias.detach().clone()
    bias.data.zero_()
    try:
        yield
    finally:
        bias.data.copy_(kept)


def _at_zero(layer: nn.Module, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An input of zeros [1, n] in a dtype that the layer takes, its own ones first, and its output in fp32."""
    state = [*layer.parameters(), *layer.buffers()]
    device = state[0].device if state else torch.device("cpu")
    own = [tensor.dtype for tensor in state if tensor.is_floating_point() and tensor.dtype.itemsize > 1]
    problem: Exception | None = None
    for dtype in dict.fromkeys([*own, *DTYPES]):
        blank = torch.zeros(1, width, dtype=dtype, device=device)
        try:
            return blank, layer(blank).float()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        # Each library has its own error for a dtype that it does not take.
        except Exception as error:
            problem = problem or error
    reason = textwrap.shorten(str(problem), 160, placeholder=" ...") or type(problem).__name__
    message = f"{type(layer).__name__} does not run on {device}, so its weight is unknown ({reason})"
    raise ValueError(message) from problem
