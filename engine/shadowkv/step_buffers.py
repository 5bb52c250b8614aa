"""The memory a batched decode step works in: made once, written at every step, enlarged between steps.

Legend: B places of the batch, H KV heads, G query heads per KV head, C chunks of a sequence, M candidate chunks,
S slots, T selected tokens (each at most), c chunk size, D head_dim of keys, V of values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longshadow.engine.ops.score_chunks import score_chunks_workspace
from longshadow.engine.ops.score_tokens import score_tokens_workspace
from longshadow.engine.ops.sparse_attention import sparse_attention_workspace
from longshadow.engine.shadowkv.resident import EMPTY
from longshadow.engine.shadowkv.rope import RotaryLayout


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a batch's buffers have room for, per sequence and KV head; chunks are of all segments together."""

    num_segments: int = 0
    num_chunks: int = 0
    num_candidates: int = 0
    num_selected: int = 0
    num_slots: int = 0

    def holds(self, needed: "Capacity") -> bool:
        """Whether `needed` fits."""
        return all(held >= getattr(needed, name) for name, held in vars(self).items())

    def joined(self, other: "Capacity") -> "Capacity":
        """Room for either."""
        return Capacity(**{name: max(held, getattr(other, name)) for name, held in vars(self).items()})

    def grown_to(self, needed: "Capacity") -> "Capacity":
        """Room for `needed`: where there is too little, for a few per cent more, and for twice the segments."""
        wanted = {name: _rounded(count, 8) for name, count in vars(needed).items()}
        wanted["num_chunks"] = _rounded(needed.num_chunks, 64)
        wanted["num_segments"] = max(1, 2 * needed.num_segments)
        return Capacity(
            **{
                name: held if held >= max(1, getattr(needed, name)) else wanted[name]
                for name, held in vars(self).items()
            }
        )


def _rounded(count: int, unit: int) -> int:
    """A multiple of `unit`, at least one, some 3 % above `count`: slots are a large part of a sequence's memory."""
    return max(unit, -(-(count + count // 32) // unit) * unit)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shapes of one layer's cache."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    chunk_size: int
    layout: RotaryLayout | None
    dtype: torch.dtype
    device: torch.device


class ResidentSlots:
    """The chunks of a batch in one layer that stay between steps: `ResidentChunks`, batched and at fixed addresses.

    Attributes:
        chunks, last_used: [B, H, S], each slot's chunk and the last step that chose it.
        has_values: [B, H, S, c] of bytes: which tokens' values were fetched.
        keys, values: [B, H, S, c, D] and [B, H, S, c, V].
        num_misses: [B, H], chunks that the last step had to bring.
    """

    def __init__(self, num_slots: int, geometry: Geometry, num_misses: torch.Tensor) -> None:
        """Empty slots; the misses are written to `num_misses`."""
        heads, slots = num_misses.shape, (num_slots, geometry.chunk_size)
        device, dtype = geometry.device, geometry.dtype
        self.chunks = torch.full((*heads, num_slots), EMPTY, dtype=torch.int32, device=device)
        self.last_used = torch.zeros(*heads, num_slots, dtype=torch.int32, device=device)
        self.has_values = torch.zeros(*heads, *slots, dtype=torch.uint8, device=device)
        self.keys = torch.empty(*heads, *slots, geometry.key_dim, dtype=dtype, device=device)
        self.values = torch.empty(*heads, *slots, geometry.value_dim, dtype=dtype, device=device)
        self.num_misses = num_misses

    def take(self, other: "ResidentSlots", origins: Sequence[int | None]) -> None:
        """Place b gets the chunks that place origins[b] of `other` has, None empties it; `other` has no more slots."""
        moves = [(place, origin) for place, origin in enumerate(origins) if origin is not None]
        if other is self:
            moves = [(place, origin) for place, origin in moves if place != origin]
        places, sources = [place for place, _ in moves], [origin for _, origin in moves]
        empty = [place for place, origin in enumerate(origins) if origin is None]
        for target, source in zip(self._slots, other._slots, strict=True):
            target[places, :, : source.shape[2]] = source[sources]
        self.chunks[empty] = EMPTY
        self.last_used[empty] = 0

    @property
    def _slots(self) -> list[torch.Tensor]:
        return [self.chunks, self.last_used, self.has_values, self.keys, self.values]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held in memory, without the misses."""
        return self._slots


class StepScratch:
    """Intermediate results of one layer's step, each written before it is read; layers of one shape share them.

    Attributes:
        chunk_scores: [B, H, C].
        candidates, slots, misses: [B, H, M], the chosen chunks, their slots, and which of them missed.
        slot_numbers: [S], 0 .. S - 1; offsets: [c], 0 .. c - 1.
        token_scores: [B, H, S c].
        places: [B, H, T], slot * c + offset of each selected token; M c of them where all tokens are taken.
        no_places: [B, H, c], for steps that select nothing.
        lse: [B, H, G].
    """

    def __init__(
        self, batch_size: int, capacity: Capacity, geometry: Geometry, *, num_groups: int, takes_all_tokens: bool
    ) -> None:
        heads, chunk_size = (batch_size, geometry.num_kv_heads), geometry.chunk_size
        num_places = (capacity.num_candidates if takes_all_tokens else capacity.num_selected) * chunk_size
        num_tokens = capacity.num_slots * chunk_size

        def ints(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=geometry.device)

        def floats(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=geometry.device)

        self.chunk_scores = floats(*heads, capacity.num_chunks)
        self.candidates = ints(*heads, capacity.num_candidates)
        self.slots = ints(*heads, capacity.num_candidates)
        self.misses = ints(*heads, capacity.num_candidates)
        self.slot_numbers = torch.arange(capacity.num_slots, dtype=torch.int32, device=geometry.device)
        self.offsets = torch.arange(chunk_size, dtype=torch.int32, device=geometry.device)
        self.token_scores = floats(*heads, num_tokens)
        self.places = ints(*heads, num_places)
        self.no_places = ints(*heads, chunk_size).fill_(EMPTY)
        self.lse = floats(*heads, num_groups)
        self.score_workspace = floats(score_chunks_workspace(*heads, num_groups, capacity.num_chunks))
        self.token_workspace = floats(score_tokens_workspace(*heads, num_groups, num_tokens))
        self.attention_workspace = floats(
            sparse_attention_workspace(*heads, num_groups, geometry.value_dim, num_places)
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held in memory."""
        return list(vars(self).values())
