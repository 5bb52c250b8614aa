"""Simple quantisers of a model's linear layers, to have something to compensate: what they keep, and its bytes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from longshadow.compress.blocks import decoder_blocks, linear_layers

# A scale and an offset in half precision, for every group of round-to-nearest.
GROUP_BITS = 32


@dataclass(frozen=True, kw_only=True)
class RoundToNearest:
    """Each group of a row on an even grid from its least to its largest weight."""

    bits: int
    group: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.bits} bits, groups of {self.group}"

    @property
    def bits_per_weight(self) -> float:
        """With scales and offsets."""
        return self.bits + GROUP_BITS / self.group

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [m, n] as it is after rounding."""
        groups = weight.view(len(weight), -1, self.group)
        lowest = groups.amin(2, keepdim=True)
        step = ((groups.amax(2, keepdim=True) - lowest) / (2**self.bits - 1)).clamp(min=1e-12)
        return ((groups - lowest) / step).round().mul(step).add(lowest).view_as(weight)


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


Quantiser = RoundToNearest | TwoOfFour


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
