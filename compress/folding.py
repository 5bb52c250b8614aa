"""Scales that a quantiser moved from one layer into another, as AWQ and SmoothQuant do.

A quantiser may multiply the columns of a layer by s and divide what feeds it by s: the norm before it, or the rows of
another layer. The model stays the same function, but its weights are no longer near the original's, and their
difference says nothing. The original's weights are brought to the same scales here.

Legend: m outputs of a layer, n inputs.
"""

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from longshadow.compress.calls import Call

# Norms are stored in half precision; scales chosen to protect weights are far from 1 somewhere.
NORM_TOLERANCE = 0.02
# How much nearer the weights have to get for a scale to be believed.
NEARER = 0.7
FED_BY_ROWS = (("up_proj", "down_proj"), ("v_proj", "o_proj"))
FARTHEST = 1.0


@torch.no_grad()
def norm_scale(original: nn.Module, quantized: nn.Module, call: Call, width: int) -> torch.Tensor | None:
    """What the columns of a layer behind a norm were multiplied by, [n] in fp32; None where nothing was folded.

    Both norms are run on what one of them was called with, so it does not matter how they hold their weights, whether
    they are gated, or normalise head by head. Each column's scale is told by the token with its largest value.
    """
    given, changed = (_outputs(module, call).view(-1, width) for module in (original, quantized))
    largest = changed.abs().argmax(0, keepdim=True)
    given, changed = (outputs.gather(0, largest).squeeze(0) for outputs in (given, changed))
    scale = torch.where(changed != 0, given / changed, 1.0)
    return None if bool(((scale - 1).abs() <= NORM_TOLERANCE).all()) else scale


def _outputs(norm: nn.Module, call: Call) -> torch.Tensor:
    """In fp32."""
    like = next(norm.parameters())

    def moved(value: Any) -> Any:
        is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(like.device, like.dtype) if is_floating else value

    positional, named = tree_map(moved, (call.positional, call.named))
    outputs: torch.Tensor = norm(*positional, **named).float()
    return outputs


def unfolded(
    weights: dict[str, torch.Tensor], approximations: dict[str, torch.Tensor], scales: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The original's weights of one block at the scales of the quantised ones, and what their columns were scaled by.

    Args:
        weights, approximations: [m, n] by the names of the layers in the block.
        scales: of the columns of layers behind norms that were changed.

    Raises ValueError where weights are farther apart than quantisation can explain, as after a rotation.
    """
    columns = dict(scales)
    result = {name: weight * scales[name] if name in scales else weight for name, weight in weights.items()}
    by_kind = {name.rpartition(".")[2]: name for name in weights}
    for first, second in FED_BY_ROWS:
        if first in by_kind and second in by_kind:
            _unfold_pair(result, approximations, columns, by_kind[first], by_kind[second])
    for name, weight in result.items():
        distance = float((weight - approximations[name]).norm() / weight.norm().clamp(min=1e-30))
        if distance > FARTHEST:
            raise ValueError(
                f"{name} of the quantised model is no approximation of the original's ({distance:.0%} apart): it is "
                "another model's, or was rotated, which cannot be compensated"
            )
    return result, columns


def _unfold_pair(
    weights: dict[str, torch.Tensor],
    approximations: dict[str, torch.Tensor],
    columns: dict[str, torch.Tensor],
    first: str,
    second: str,
) -> None:
    """Where rows of `first` were divided by what columns of `second` were multiplied by, both weights are too.

    Any such scale leaves the original's function as it is, so an inexact estimate does no harm.
    """
    rows = (approximations[first] * weights[first]).sum(1) / weights[first].square().sum(1).clamp(min=1e-30)
    num_inputs = weights[second].shape[1]
    if num_inputs != len(rows) or not bool((rows > 0).all()):
        return  # heads that share values are never folded
    scaled = weights[second] / rows
    before, after = ((weights[second] - approximations[second]).norm(), (scaled - approximations[second]).norm())
    if after < NEARER * before:
        weights[first], weights[second] = weights[first] * rows.unsqueeze(1), scaled
        columns[second] = 1 / rows
