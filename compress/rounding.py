"""Rounding to the nearest point of an even grid: the plainest quantiser, to compare what the same bytes buy as bits."""

from dataclasses import dataclass

import torch

# A scale and an offset in half precision, for every group.
GROUP_BITS = 32
GROUPS = (16, 32, 64, 128)


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
        """The weight [m, n] as it is after rounding; n is a multiple of the group."""
        groups = weight.view(len(weight), -1, self.group)
        lowest = groups.amin(2, keepdim=True)
        step = ((groups.amax(2, keepdim=True) - lowest) / (2**self.bits - 1)).clamp(min=1e-12)
        rounded: torch.Tensor = ((groups - lowest) / step).round() * step + lowest
        return rounded.view_as(weight)


def finest_rounding(bits_per_weight: float, widths: set[int]) -> RoundToNearest | None:
    """The one with the most bits per weight, at most so many, whose groups divide all widths; None where none does."""
    fitting = [
        rounding
        for bits in range(1, 9)
        for group in GROUPS
        if (rounding := RoundToNearest(bits=bits, group=group)).bits_per_weight <= bits_per_weight
        and all(width % group == 0 for width in widths)
    ]
    return max(fitting, key=lambda rounding: (rounding.bits_per_weight, rounding.bits), default=None)
