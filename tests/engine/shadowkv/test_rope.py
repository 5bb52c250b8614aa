"""Rotation and its inverse."""

from typing import Literal

import pytest
import torch

from longshadow.engine.shadowkv.rope import RotaryLayout, Rotation, rotate, unrotate


def rotation(num_tokens: int, num_pairs: int, scaling: float = 1.0) -> Rotation:
    angles = torch.arange(num_tokens).unsqueeze(1) / 100.0 ** (torch.arange(num_pairs) / num_pairs)
    return Rotation(angles.cos() * scaling, angles.sin() * scaling)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(("rotary_dim", "scaling"), [(16, 1.0), (8, 1.0), (16, 1.3466)])
def test_unrotate_inverts_rotate(style: Literal["half", "interleaved"], rotary_dim: int, scaling: float) -> None:
    layout = RotaryLayout(style=style, rotary_dim=rotary_dim)
    angles = rotation(63, rotary_dim // 2, scaling)
    keys = torch.randn(3, 63, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unrotate(rotate(keys, angles, layout), angles, layout), keys, rtol=0, atol=2e-6)
    assert torch.equal(rotate(keys, angles, layout)[..., rotary_dim:], keys[..., rotary_dim:])


def test_rotation_is_a_complex_product_of_the_pairs() -> None:
    angles = rotation(7, 4)
    keys = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    turned = torch.complex(angles.cos, angles.sin)
    expected = torch.view_as_real(torch.view_as_complex(keys.unflatten(-1, (4, 2))) * turned).flatten(-2)
    torch.testing.assert_close(rotate(keys, angles, RotaryLayout(style="interleaved", rotary_dim=8)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_round_trip_stays_at_rounding_level(dtype: torch.dtype) -> None:
    layout = RotaryLayout(style="half", rotary_dim=16)
    angles = rotation(63, 8)
    angles = Rotation(angles.cos.to(dtype), angles.sin.to(dtype))
    keys = torch.randn(1, 63, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = unrotate(rotate(keys, angles, layout).to(dtype), angles, layout)
    assert float((back - keys.float()).norm() / keys.float().norm()) < torch.finfo(dtype).eps
