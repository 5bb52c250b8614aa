"""What a model caches of a token, and what a sequence goes on from: all that its memory depends on beside its length.

Legend: H KV heads, D head_dim of keys.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What one attention layer caches of a token.

    Attributes:
        itemsize: bytes of an element of keys and values.
        window: tokens a sliding layer sees; None for full attention, which is compressed.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    window: int | None = None

    @property
    def key_width(self) -> int:
        """Elements of a token's keys, H x D."""
        return self.num_kv_heads * self.key_dim

    @property
    def token_bytes(self) -> int:
        """Exact keys and values of a token."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.itemsize

    def exact_bytes(self, num_tokens: int) -> int:
        """What a stock cache holds of so many tokens."""
        return self.token_bytes * (num_tokens if self.window is None else min(num_tokens, self.window))


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a sequence goes on from: the tokens of each shared segment, and of its own copy of the tail."""

    segments: tuple[int, ...] = ()
    tail: int = 0

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return sum(self.segments) + self.tail
