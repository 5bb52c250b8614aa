"""An immutable compressed piece of a sequence: keys as low-rank factors, landmarks, exact chunks, values.

Legend: H KV heads, n tokens, c chunk size, C = n / c chunks, D head_dim of keys, W = H x D, r rank,
p exact chunks per head, k chunks asked for per head. Values may have another head_dim than keys.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from longshadow.engine.ops import Operators
from longshadow.engine.shadowkv.basis import GramAccumulator
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.landmarks import choose_exact_chunks, summarize_chunks
from longshadow.engine.shadowkv.rope import RotaryLayout, Rotation, rotate, unrotate
from longshadow.engine.shadowkv.storage import RowStore
from longshadow.engine.shadowkv.summary import KeySummary, summarize

FACTORISATION_BLOCK = 4096


class KeySource(Protocol):
    """Post-RoPE keys of a segment's chunks."""

    def gather(self, chunks_Hk: torch.Tensor) -> torch.Tensor:
        """Keys of each head's own chunks, [H, k, c, D]."""

    def span(self, start: int, stop: int) -> torch.Tensor:
        """Keys of chunks start .. stop of every head, [H, stop - start, c, D]."""

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What is held in memory, by part."""


class LowRankKeys:
    """key = RoPE(coefficients @ basis + mean): one coefficient row per token, one basis per head."""

    def __init__(
        self,
        keys_HnD: torch.Tensor,
        rotation: Rotation | None,
        layout: RotaryLayout | None,
        config: ShadowKVConfig,
        *,
        rank: int | None,
        weights_HD: torch.Tensor | None,
        summary: KeySummary | None = None,
    ) -> None:
        """Factorises keys whose `rotation` is undone first (None: a layer without RoPE).

        `weights_HD` says what an error in each element costs (None: all the same). Without a `summary` of the keys
        it works block by block: beside the keys themselves it needs one block of un-rotated keys.
        """
        num_heads, num_tokens, head_dim = keys_HnD.shape
        self._rotation, self._layout = rotation, layout
        self._num_heads, self._chunk_size = num_heads, config.chunk_size
        blocks = [slice(start, start + FACTORISATION_BLOCK) for start in range(0, num_tokens, FACTORISATION_BLOCK)]

        def joint_keys(block: slice) -> torch.Tensor:
            if summary is not None:
                return summary.plain_nW[block]
            keys = keys_HnD[:, block]
            if rotation is not None and layout is not None:
                keys = unrotate(keys, rotation[block], layout)
            keys = keys if keys.dtype == torch.float64 else keys.float()
            joint: torch.Tensor = keys.transpose(0, 1).flatten(1)
            return joint

        weights = None if weights_HD is None else weights_HD.flatten()
        gram = GramAccumulator(num_heads * head_dim, keys_HnD.device, weights)
        if summary is not None:
            gram.add_sums(summary.gram_WW, summary.key_sum_W, num_tokens)
        else:
            for block in blocks:
                gram.add(joint_keys(block))
        compute_dtype = torch.float64 if keys_HnD.dtype == torch.float64 else torch.float32
        basis = gram.solve(rank=rank, rank_energy=config.rank_energy, center=config.center_keys, dtype=compute_dtype)
        self.energy_kept = basis.energy_kept
        self.rank = basis.rows.shape[0]
        dtype = keys_HnD.dtype
        coefficients = torch.cat([basis.coefficients(joint_keys(block)).to(dtype) for block in blocks])
        self._coefficients = RowStore(coefficients.unflatten(0, (-1, config.chunk_size)), quantized=config.factor_dtype)
        self._basis_HrD = basis.rows.unflatten(1, (num_heads, head_dim)).transpose(0, 1).to(dtype).contiguous()
        self._mean_H1D = basis.mean.view(num_heads, 1, head_dim).to(dtype)

    @classmethod
    def restore(
        cls,
        coefficients: RowStore,
        basis: list[torch.Tensor],
        rotation: Rotation | None,
        layout: RotaryLayout | None,
        config: ShadowKVConfig,
        *,
        energy_kept: float,
    ) -> "LowRankKeys":
        """Keys from their factors; `basis`: [H, r, D] and the mean [H, 1, D]."""
        keys = cls.__new__(cls)
        keys._rotation, keys._layout = rotation, layout
        keys._basis_HrD, keys._mean_H1D = basis
        keys._num_heads, keys.rank = keys._basis_HrD.shape[:2]
        keys._chunk_size, keys.energy_kept = config.chunk_size, energy_kept
        keys._coefficients = coefficients
        return keys

    def gather(self, chunks_Hk: torch.Tensor) -> torch.Tensor:
        """Rebuilds the keys of each head's own chunks, [H, k, c, D]."""
        num_heads, num_chunks = chunks_Hk.shape
        rows = self._coefficients.gather(chunks_Hk.flatten()).view(num_heads, num_chunks * self._chunk_size, -1)
        if self._rotation is None:
            return self._rebuild(rows, None)
        # Whole chunks of cos and sin at a time: a few long rows are read faster than many short ones.
        chunks, shape = chunks_Hk.flatten(), (num_heads, num_chunks * self._chunk_size, -1)
        cos, sin = (
            table.view(-1, self._chunk_size * table.shape[1]).index_select(0, chunks).view(shape)
            for table in (self._rotation.cos, self._rotation.sin)
        )
        return self._rebuild(rows, Rotation(cos, sin))

    def span(self, start: int, stop: int) -> torch.Tensor:
        """Rebuilds the keys of chunks start .. stop of every head, [H, stop - start, c, D]."""
        rows = self._coefficients.slice(start, stop).flatten(0, 1).expand(self._num_heads, -1, -1)
        tokens = slice(start * self._chunk_size, stop * self._chunk_size)
        return self._rebuild(rows, None if self._rotation is None else self._rotation[tokens])

    def _rebuild(self, rows_Hnr: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        keys = torch.baddbmm(self._mean_H1D, rows_Hnr, self._basis_HrD)
        if rotation is not None and self._layout is not None:
            keys = rotate(keys, rotation, self._layout).to(keys.dtype)
        chunks: torch.Tensor = keys.unflatten(1, (-1, self._chunk_size))
        return chunks

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What is held in memory, by part; the rotation is shared by the layers of a sequence."""
        parts = {"factors": self._coefficients.tensors, "basis": [self._basis_HrD, self._mean_H1D]}
        if self._rotation is not None:
            parts["rotation"] = [self._rotation.cos, self._rotation.sin]
        return parts


class StoredChunks:
    """Per-token vectors [H, n, D] kept as they are, in chunks, for exact keys and for values."""

    def __init__(self, tokens_HnD: torch.Tensor, config: ShadowKVConfig, *, part: str) -> None:
        self._part = part
        self._num_heads = tokens_HnD.shape[0]
        self._chunk_size = config.chunk_size
        self._num_chunks = tokens_HnD.shape[1] // config.chunk_size
        self._rows = RowStore(
            tokens_HnD.unflatten(1, (-1, config.chunk_size)).flatten(0, 1),
            quantized=config.value_dtype,
            host=config.value_store == "host",
        )

    @classmethod
    def restore(cls, rows: RowStore, config: ShadowKVConfig, *, part: str, num_heads: int) -> "StoredChunks":
        """Vectors from their rows."""
        stored = cls.__new__(cls)
        stored._part, stored._num_heads, stored._chunk_size = part, num_heads, config.chunk_size
        stored._num_chunks = rows.tensors[0].shape[0] // num_heads
        stored._rows = rows
        return stored

    def gather(self, chunks_Hk: torch.Tensor) -> torch.Tensor:
        """The vectors of each head's own chunks, [H, k, c, D]."""
        heads = torch.arange(self._num_heads, device=chunks_Hk.device).unsqueeze(1)
        rows = self._rows.gather((heads * self._num_chunks + chunks_Hk).flatten())
        return rows.view(*chunks_Hk.shape, *rows.shape[1:])

    def gather_tokens(self, tokens_Ht: torch.Tensor) -> torch.Tensor:
        """The vectors of each head's own tokens, [H, t, D]."""
        heads = torch.arange(self._num_heads, device=tokens_Ht.device).unsqueeze(1)
        num_tokens = self._num_chunks * self._chunk_size
        vectors = self._rows.gather_groups((heads * num_tokens + tokens_Ht).flatten())
        return vectors.view(*tokens_Ht.shape, vectors.shape[1])

    def span(self, start: int, stop: int) -> torch.Tensor:
        """The vectors of chunks start .. stop of every head, [H, stop - start, c, D]."""
        return torch.stack(
            [
                self._rows.slice(head * self._num_chunks + start, head * self._num_chunks + stop)
                for head in range(self._num_heads)
            ]
        )

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What is held in memory, by part."""
        return {self._part: self._rows.tensors}


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment:
    """`num_tokens` consecutive tokens of one sequence in one layer. Immutable: shared, never copied.

    Attributes:
        keys, values: sources of post-RoPE keys and of values, by chunk.
        landmarks: mean post-RoPE key per chunk, rows = heads, groups = chunks.
        exact_chunks: [H, p] ascending ids of sink and outlier chunks, excluded from selection.
        exact_keys, exact_values: their tokens, [H, p c, D], on the device.
        energy_kept: share of the keys' energy in the low-rank factors (1 for exact keys).
    """

    num_tokens: int
    chunk_size: int
    keys: KeySource
    values: StoredChunks
    landmarks: RowStore
    exact_chunks: torch.Tensor
    exact_keys: torch.Tensor
    exact_values: torch.Tensor
    energy_kept: float

    @property
    def num_chunks(self) -> int:
        """Chunks, exact ones included."""
        return self.num_tokens // self.chunk_size

    def span(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of chunks start .. stop, [H, (stop - start) c, D], exact where the segment is."""
        keys = self.keys.span(start, stop)
        inside = (self.exact_chunks >= start) & (self.exact_chunks < stop)
        heads, places = inside.nonzero(as_tuple=True)
        exact = self.exact_keys.unflatten(1, (-1, self.chunk_size))
        keys[heads, self.exact_chunks[heads, places] - start] = exact[heads, places]
        return keys.flatten(1, 2), self.values.span(start, stop).flatten(1, 2)

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What is held in memory, by part."""
        return {
            **self.keys.tensors(),
            **self.values.tensors(),
            "landmarks": self.landmarks.tensors,
            "exact chunks": [self.exact_chunks, self.exact_keys, self.exact_values],
        }


def compress(
    keys_HnD: torch.Tensor,
    values_HnD: torch.Tensor,
    rotation: Rotation | None,
    layout: RotaryLayout | None,
    config: ShadowKVConfig,
    *,
    rank: int | None,
    key_weights: torch.Tensor | None,
    num_sink_chunks: int,
    num_outlier_chunks: int,
    operators: Operators | None = None,
) -> Segment:
    """Compresses exact post-RoPE keys and values of n tokens (a multiple of the chunk size).

    `rotation` holds the cos and sin the keys were rotated with, `rank` None means `config.rank_energy`,
    `key_weights` [H, D] are those of `QueryEnergy`. With `operators` the keys are read by one of them.
    """
    # First of all: host memory is made and pinned while a GPU still attends to the prompt.
    values = StoredChunks(values_HnD, config, part="values")
    summary: KeySummary | None = None
    if operators is not None and config.key_store == "low_rank":
        summary = summarize(keys_HnD, rotation, layout, config.chunk_size, operators)
        landmarks, min_cosine = summary.landmarks_HCD, summary.min_cosine_HC
    else:
        landmarks, min_cosine = summarize_chunks(keys_HnD, config.chunk_size)
    exact_chunks = choose_exact_chunks(min_cosine, num_sink_chunks, num_outlier_chunks)
    keys: KeySource
    energy_kept = 1.0
    if config.key_store == "exact":
        keys = StoredChunks(keys_HnD, config, part="keys")
    else:
        keys = LowRankKeys(keys_HnD, rotation, layout, config, rank=rank, weights_HD=key_weights, summary=summary)
        energy_kept = keys.energy_kept
    heads = torch.arange(keys_HnD.shape[0], device=keys_HnD.device).unsqueeze(1)
    return Segment(
        num_tokens=keys_HnD.shape[1],
        chunk_size=config.chunk_size,
        keys=keys,
        values=values,
        landmarks=RowStore(landmarks.to(keys_HnD.dtype), quantized=config.factor_dtype),
        exact_chunks=exact_chunks,
        exact_keys=keys_HnD.unflatten(1, (-1, config.chunk_size))[heads, exact_chunks].flatten(1, 2),
        exact_values=values_HnD.unflatten(1, (-1, config.chunk_size))[heads, exact_chunks].flatten(1, 2),
        energy_kept=energy_kept,
    )


def restore(
    parts: dict[str, list[torch.Tensor]],
    rotation: Rotation | None,
    layout: RotaryLayout | None,
    config: ShadowKVConfig,
    *,
    energy_kept: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Segment:
    """The segment whose `tensors` are `parts`, copied to where they belong: keys and values in `dtype` on `device`.

    The inverse of `Segment.tensors`, but for the rotation, which many segments may share.
    """
    host = config.value_store == "host"
    exact_chunks, exact_keys, exact_values = (tensor.to(device, copy=True) for tensor in parts["exact chunks"])
    num_heads = exact_keys.shape[0]
    landmarks = RowStore.restore(parts["landmarks"], dtype=dtype, device=device)
    keys: KeySource
    if config.key_store == "exact":
        rows = RowStore.restore(parts["keys"], dtype=dtype, device=device, host=host)
        keys = StoredChunks.restore(rows, config, part="keys", num_heads=num_heads)
    else:
        coefficients = RowStore.restore(parts["factors"], dtype=dtype, device=device)
        basis = [tensor.to(device, copy=True) for tensor in parts["basis"]]
        keys = LowRankKeys.restore(coefficients, basis, rotation, layout, config, energy_kept=energy_kept)
    value_rows = RowStore.restore(parts["values"], dtype=dtype, device=device, host=host)
    return Segment(
        num_tokens=landmarks.tensors[0].shape[1] * config.chunk_size,
        chunk_size=config.chunk_size,
        keys=keys,
        values=StoredChunks.restore(value_rows, config, part="values", num_heads=num_heads),
        landmarks=landmarks,
        exact_chunks=exact_chunks,
        exact_keys=exact_keys,
        exact_values=exact_values,
        energy_kept=energy_kept,
    )
