"""Rotary position embedding and its inverse, as one rotation of element pairs for every model family.

Legend: n tokens, D head_dim, R rotated elements of a head (R <= D), P = R / 2 pairs.
"""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class RotaryLayout:
    """Which elements of a head form the rotated pairs.

    "half" pairs element i with i + R/2 (Llama), "interleaved" pairs 2i with 2i + 1 (GLM, Cohere). Elements
    from `rotary_dim` on are not rotated.
    """

    style: Literal["half", "interleaved"]
    rotary_dim: int

    def pairs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the second elements of the pairs of x [..., D], as views [..., P]."""
        if self.style == "interleaved":
            return x[..., 0 : self.rotary_dim : 2], x[..., 1 : self.rotary_dim : 2]
        half = self.rotary_dim // 2
        return x[..., :half], x[..., half : self.rotary_dim]


@dataclass(frozen=True, eq=False)
class Rotation:
    """cos and sin of some tokens' rotation angles, [n, P] each, times the family's attention scaling."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __getitem__(self, tokens: slice | torch.Tensor) -> "Rotation":
        return Rotation(self.cos[tokens], self.sin[tokens])

    def to(self, device: torch.device) -> "Rotation":
        return Rotation(self.cos.to(device), self.sin.to(device))


def rotate(x: torch.Tensor, rotation: Rotation, layout: RotaryLayout) -> torch.Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for the pairs of x [..., D]; rotation broadcasts to [..., P].

    Half-precision inputs are rotated in fp32. Returns x's shape in the dtype computed in.
    """
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    out = torch.empty_like(x)
    first, second = layout.pairs(x)
    out_first, out_second = layout.pairs(out)
    cos, sin = rotation.cos.to(x.dtype), rotation.sin.to(x.dtype)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    out[..., layout.rotary_dim :] = x[..., layout.rotary_dim :]
    return out


def unrotate(x: torch.Tensor, rotation: Rotation, layout: RotaryLayout) -> torch.Tensor:
    """The inverse of `rotate`: rotation by the negative angle, divided by cos^2 + sin^2.

    The division undoes the attention scaling of YaRN and LongRoPE and the rounding of cos and sin.
    """
    norm = rotation.cos.float().square() + rotation.sin.float().square()
    return rotate(x, Rotation(rotation.cos.float() / norm, -rotation.sin.float() / norm), layout)
