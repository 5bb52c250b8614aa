"""Simple quantisers of a model's linear layers, to have something to compensate: what they keep, and its bytes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from longshadow.compress.blocks import decoder_blocks, linear_layers
from longshadow.compress.rounding import RoundToNearest


@dataclass(frozen=True, kw_only=True)
class TwoOfFour:
    """Of every four weights of a row the two largest are kept."""

    name: str = "2 of 4 kept"
    bits_per_weight: float = 16 / 2 + 1.5

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [m, n] as it is after pruning."""
        fours = weight.view(len(weight), -1, 4)
        kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(2, fours.abs().topk(2, dim=2).indices, True)
        return (fours * kept).view_as(weight)


@dataclass(frozen=True, kw_only=True)
class NormalFloat:
    """NF4 (arXiv 2305.14314): blocks of 64 in a row, scaled by their largest magnitude, on quantiles of a normal."""

    name: str = "NF4, blocks of 64"
    block: int = 64
    bits_per_weight: float = 4 + 32 / 64

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [m, n] as it is after rounding."""
        levels = normal_float_levels().to(weight)
        blocks = weight.view(-1, self.block)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
        bounds = (levels[1:] + levels[:-1]) / 2
        return (levels[torch.bucketize(blocks / scale, bounds)] * scale).view_as(weight)


def normal_float_levels() -> torch.Tensor:
    """The 16 levels, from -1 to 1: evenly spaced quantiles, eight above 0, seven below, and 0 itself."""
    tail = (1 - 1 / 32 + 1 - 1 / 30) / 2  # the probability up to the outermost level
    above = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (levels / levels.max()).float()


Quantiser = RoundToNearest | TwoOfFour | NormalFloat


@torch.no_grad()
def quantised(model: nn.Module, quantiser: Quantiser) -> nn.Module:
    """A copy whose blocks' linear layers have the quantiser's weights."""
    result = copy.deepcopy(model)
    for block in decoder_blocks(result):
        for layer in linear_layers(block).values():
            weight = layer.get_parameter("weight")
            weight.copy_(quantiser(weight))
    return result


def num_block_weights(model: nn.Module) -> int:
    """Weights that a quantiser touches."""
    return sum(
        layer.get_parameter("weight").numel()
        for block in decoder_blocks(model)
        for layer in linear_layers(block).values()
    )
