"""What compressing tokens leaves, and what it needs meanwhile, in bytes.

Legend: H KV heads, D head_dim of keys, W = H x D, c chunk size, r rank.
"""

from dataclasses import dataclass

from longshadow.engine.runtime.memory import Bytes
from longshadow.engine.runtime.shapes import LayerShape
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.segment import FACTORISATION_BLOCK

INDEX_BYTES = 8
SCALE_BYTES = 4
FP32_BYTES = 4
FP64_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class SegmentSizes:
    """Of the segments of one configuration; `segment_tokens`: generated tokens that are compressed together."""

    config: ShadowKVConfig
    segment_tokens: int

    def num_exact_chunks(self, num_tokens: int, first: int) -> int:
        """Sink and outlier chunks per head of a segment; `first`: tokens of the first one, 0 if this is it."""
        config = self.config
        num_sink, num_outlier = config.num_sink_chunks, config.num_outlier_chunks
        if first:
            num_sink, num_outlier = 0, round(num_outlier * num_tokens / first)
        num_chunks = num_tokens // config.chunk_size
        num_sink = min(num_sink, num_chunks)
        return num_sink + min(num_outlier, num_chunks - num_sink)

    def rank(self, layer: LayerShape, num_tokens: int, first: int) -> int:
        """Of such a segment; the largest possible where the keys' energy decides."""
        if self.config.rank_energy is not None:
            return layer.key_width
        if first and num_tokens == self.segment_tokens:
            return min(layer.key_width, self.config.generated_rank(layer.key_width, num_tokens))
        return min(layer.key_width, self.config.prompt_rank(layer.key_width))

    def stored(self, num_bytes: int) -> Bytes:
        """Bytes in the value store."""
        return Bytes(host=num_bytes) if self.config.value_store == "host" else Bytes(device=num_bytes)

    def segment(self, layer: LayerShape, num_tokens: int, first: int) -> Bytes:
        """A segment of so many tokens."""
        config = self.config
        heads, width, item = layer.num_kv_heads, layer.key_width, layer.itemsize
        num_chunks = num_tokens // config.chunk_size
        exact = self.num_exact_chunks(num_tokens, first)
        device = exact * (heads * INDEX_BYTES + config.chunk_size * layer.token_bytes)
        device += _rows(num_chunks * heads, layer.key_dim, item, packed=config.factor_dtype is not None)
        packed = config.value_dtype is not None
        stored = _rows(num_tokens * heads, layer.value_dim, item, packed=packed)
        if config.key_store == "exact":
            stored += _rows(num_tokens * heads, layer.key_dim, item, packed=packed)
        else:
            rank = self.rank(layer, num_tokens, first)
            device += _rows(num_tokens, rank, item, packed=config.factor_dtype is not None) + (rank + 1) * width * item
        return Bytes(device=device) + self.stored(stored)

    def workspace(self, layer: LayerShape, num_tokens: int) -> Bytes:
        """An upper bound on what compressing so many tokens needs beside what it leaves."""
        width = layer.key_width
        rank = width if self.config.rank_energy is not None else self.config.prompt_rank(width)
        item = max(FP32_BYTES, layer.itemsize)
        # Exact tokens, joined and brought to the device; keys, then coefficients, in fp32 or better.
        per_token = 2 * layer.token_bytes + 2 * width * item + 4 * rank * item
        gram = 5 * width * width * FP64_BYTES + 4 * FACTORISATION_BLOCK * width * item
        return Bytes(device=num_tokens * per_token + gram)


def _rows(num_groups: int, group_width: int, itemsize: int, *, packed: bool) -> int:
    """A `RowStore` of so many groups: elements, and in one byte each a scale for each group."""
    return num_groups * (group_width + SCALE_BYTES if packed else group_width * itemsize)
