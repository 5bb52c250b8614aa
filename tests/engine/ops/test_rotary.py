"""Layouts as operators are told of them."""

import pytest

from longshadow.engine.ops.rotary import RotaryStyle
from longshadow.engine.shadowkv.rope import RotaryLayout


@pytest.mark.parametrize(
    ("layout", "style"),
    [
        (None, RotaryStyle.NONE),
        (RotaryLayout(style="half", rotary_dim=64), RotaryStyle.HALF),
        (RotaryLayout(style="interleaved", rotary_dim=16), RotaryStyle.INTERLEAVED),
    ],
)
def test_a_layout_comes_back_from_its_style(layout: RotaryLayout | None, style: RotaryStyle) -> None:
    assert RotaryStyle.of(layout) == style
    assert style.layout(0 if layout is None else layout.rotary_dim) == layout
