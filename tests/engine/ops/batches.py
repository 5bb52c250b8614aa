"""Random batches of ragged sequences, as the cache holds them and as operators see them.

Legend: B sequences, H KV heads, G query heads per KV head, n tokens, c chunk size, D head_dim of keys, V of values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longshadow.engine.ops.tables import RowKind, SegmentTable
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.rope import RotaryLayout, Rotation
from longshadow.engine.shadowkv.segment import Segment, compress
from longshadow.engine.shadowkv.storage import ExactTokens, RowStore

QUANTISED = {RowKind.MODEL: None, RowKind.INT8: "int8", RowKind.FP8: "fp8"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Sequences of several segments and a tail each. `table` is made from the others."""

    segments: list[list[Segment]]
    tails: list[ExactTokens]
    table: SegmentTable
    num_kv_heads: int
    key_dim: int
    value_dim: int
    chunk_size: int
    dtype: torch.dtype
    device: torch.device
    layout: RotaryLayout | None

    @property
    def num_chunks(self) -> list[int]:
        """Chunks of each sequence, exact ones included."""
        return [sum(segment.num_chunks for segment in segments) for segments in self.segments]

    def query(self, group: int, *, seed: int = 100) -> torch.Tensor:
        """Queries [B, H, G, D] that attend unevenly."""
        shape = (len(self.segments), self.num_kv_heads, group, self.key_dim)
        return (2 * _normal(seed, *shape)).to(self.device, self.dtype)


def random_batch(
    chunks: Sequence[Sequence[int]],
    *,
    tails: Sequence[int] | None = None,
    num_kv_heads: int = 2,
    key_dim: int = 32,
    value_dim: int | None = None,
    chunk_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    factors: RowKind = RowKind.MODEL,
    values: RowKind = RowKind.MODEL,
    rank: int = 20,
    layout: RotaryLayout | None = None,
    num_sink_chunks: int = 1,
    num_outlier_chunks: int = 2,
    max_segments: int | None = None,
    share_first: bool = False,
    seed: int = 0,
) -> Batch:
    """A sequence for each element of `chunks`, with a segment of so many chunks for each of its elements.

    `tails`: tokens after the segments, default none. `layout`: of RoPE, None without. `share_first`: all sequences
    begin with one and the same segment, the first sequence's. `max_segments`: room in the table, default one too much.
    """
    value_dim = value_dim or key_dim
    config = ShadowKVConfig(
        chunk_size=chunk_size,
        factor_dtype=QUANTISED[factors],
        value_dtype=QUANTISED[values],
    )
    segments: list[list[Segment]] = []
    exact: list[ExactTokens] = []
    for sequence, sizes in enumerate(chunks):
        segments.append([])
        for position, size in enumerate(sizes):
            if share_first and position == 0 and sequence > 0:
                segments[-1].append(segments[0][0])
                continue
            own_seed = seed + 1000 * sequence + 10 * position
            segment = compress(
                _tokens(own_seed, num_kv_heads, size * chunk_size, key_dim).to(device, dtype),
                _tokens(own_seed + 1, num_kv_heads, size * chunk_size, value_dim).to(device, dtype),
                None if layout is None else _rotation(own_seed + 2, size * chunk_size, layout).to(device),
                layout,
                config,
                rank=rank,
                key_weights=None,
                num_sink_chunks=num_sink_chunks,
                num_outlier_chunks=num_outlier_chunks,
            )
            segments[-1].append(segment)
        exact.append(ExactTokens(device=device))
        length = 0 if tails is None else tails[sequence]
        exact[-1].append(
            _tokens(seed + 1000 * sequence + 8, num_kv_heads, length, key_dim).to(device, dtype),
            _tokens(seed + 1000 * sequence + 9, num_kv_heads, length, value_dim).to(device, dtype),
        )
    table = SegmentTable(
        batch_size=len(chunks),
        max_segments=max(map(len, chunks)) + 1 if max_segments is None else max_segments,
        factors=factors,
        values=values,
        dtype=dtype,
        device=device,
    )
    for index, (own, tail) in enumerate(zip(segments, exact, strict=True)):
        table.assign(index, own, (tail.keys, tail.values))
    return Batch(
        segments=segments,
        tails=exact,
        table=table,
        num_kv_heads=num_kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        chunk_size=chunk_size,
        dtype=dtype,
        device=device,
        layout=layout,
    )


def unpacked(store: RowStore) -> torch.Tensor:
    """The exact numbers that a store's rows stand for, fp64."""
    rows, *scales = store.tensors
    return rows.double() * scales[0].double().unsqueeze(-1) if scales else rows.double()


def _tokens(seed: int, num_heads: int, num_tokens: int, width: int) -> torch.Tensor:
    """Vectors [H, n, width] around one that all share, as keys with a bias are."""
    noise = _normal(seed, num_heads, num_tokens, width)
    return noise + 0.5 * _normal(seed + 5, num_heads, 1, width)


def _rotation(seed: int, num_tokens: int, layout: RotaryLayout) -> Rotation:
    angles = 100 * _normal(seed, num_tokens, layout.rotary_dim // 2)
    return Rotation(angles.cos(), angles.sin())


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
