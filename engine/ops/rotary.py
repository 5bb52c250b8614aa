"""How operators are told of a layer's rotary layout."""

from enum import IntEnum

from longshadow.engine.shadowkv.rope import RotaryLayout


class RotaryStyle(IntEnum):
    """Which elements of a head form the rotated pairs (see `RotaryLayout`); NONE without RoPE."""

    NONE = 0
    HALF = 1
    INTERLEAVED = 2

    @classmethod
    def of(cls, layout: RotaryLayout | None) -> "RotaryStyle":
        """The style of a layout, None without RoPE."""
        return cls.NONE if layout is None else cls[layout.style.upper()]

    def layout(self, rotary_dim: int) -> RotaryLayout | None:
        """The inverse of `of`."""
        if self == RotaryStyle.NONE:
            return None
        return RotaryLayout(style="half" if self == RotaryStyle.HALF else "interleaved", rotary_dim=rotary_dim)
