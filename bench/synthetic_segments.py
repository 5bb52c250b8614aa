"""Segments filled at once with random contents of the right shapes and kinds: no prompt is read, nothing compressed.

Legend: H KV heads, n tokens, c chunk size, C = n / c chunks, D head_dim, r rank, p exact chunks per head.
"""

from __future__ import annotations

import torch

from bench.synthetic import ModelShape
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.rope import Rotation
from longshadow.engine.shadowkv.segment import LowRankKeys, Segment, StoredChunks
from longshadow.engine.shadowkv.storage import RowDtype, RowStore

# Of random int8 numbers, so that the vectors they stand for have about unit variance.
INT8_SCALE = 1 / 74


class SegmentMaker:
    """Makes segments of `num_tokens` (a multiple of the chunk size) for one layer of a model each."""

    def __init__(
        self,
        shape: ModelShape,
        config: ShadowKVConfig,
        num_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        self._shape, self._config, self._num_tokens = shape, config, num_tokens
        self._dtype, self._device = dtype, device
        self._rank = config.prompt_rank(shape.key_width)
        self._generator = torch.Generator(device).manual_seed(seed)

    @property
    def num_exact_chunks(self) -> int:
        """Sink and outlier chunks per head."""
        return self._config.num_sink_chunks + self._config.num_outlier_chunks

    def rotation(self) -> Rotation:
        """cos and sin of all tokens, which the layers of a sequence share."""
        rotation = self._shape.rotation(self._num_tokens, str(self._device))
        return Rotation(rotation.cos.to(self._dtype), rotation.sin.to(self._dtype))

    def values(self) -> StoredChunks:
        """Values of all heads, where the configuration keeps them; segments may share them."""
        heads, chunk_size = self._shape.num_kv_heads, self._config.chunk_size
        rows = self._rows(
            heads * (self._num_tokens // chunk_size),
            chunk_size,
            self._shape.head_dim,
            quantized=self._config.value_dtype,
            host=self._config.value_store == "host",
        )
        return StoredChunks.restore(rows, self._config, part="values", num_heads=heads)

    def segment(self, values: StoredChunks, rotation: Rotation, exact_chunks: torch.Tensor) -> Segment:
        """A segment with these values; `exact_chunks` [p] are the same for all heads."""
        heads, head_dim, chunk_size = self._shape.num_kv_heads, self._shape.head_dim, self._config.chunk_size
        num_chunks, packed = self._num_tokens // chunk_size, self._config.factor_dtype
        num_exact_tokens = len(exact_chunks) * chunk_size
        basis = self._normal(heads, self._rank, head_dim).mul_(self._rank**-0.5)
        keys = LowRankKeys.restore(
            self._rows(num_chunks, chunk_size, self._rank, quantized=packed),
            [basis, self._normal(heads, 1, head_dim)],
            rotation,
            self._shape.layout,
            self._config,
            energy_kept=1.0,
        )
        return Segment(
            num_tokens=self._num_tokens,
            chunk_size=chunk_size,
            keys=keys,
            values=values,
            landmarks=self._rows(heads, num_chunks, head_dim, quantized=packed),
            exact_chunks=exact_chunks.to(self._device).expand(heads, -1).contiguous(),
            exact_keys=self.tokens(num_exact_tokens),
            exact_values=self.tokens(num_exact_tokens),
            energy_kept=1.0,
        )

    def tokens(self, num_tokens: int) -> torch.Tensor:
        """Vectors [H, n, D] of so many tokens."""
        return self._normal(self._shape.num_kv_heads, num_tokens, self._shape.head_dim)

    def _rows(self, *shape: int, quantized: RowDtype | None, host: bool = False) -> RowStore:
        if quantized == "int8":
            rows = torch.randint(-127, 128, shape, dtype=torch.int8, device=self._device, generator=self._generator)
            scales = torch.full(shape[:-1], INT8_SCALE, device=self._device)
            return RowStore.restore([rows, scales], dtype=self._dtype, device=self._device, host=host)
        return RowStore(self._normal(*shape), quantized=quantized, host=host)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device, dtype=self._dtype)
