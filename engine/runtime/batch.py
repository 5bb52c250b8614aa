"""The cache that a model sees: many sequences of different lengths in one forward, each attended by itself.

Legend: B sequences, Hq query heads, H KV heads, T tokens, D head_dim.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Sequence_
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from longshadow.engine.runtime.parked import attend_parked, attends_parked, causal_mask
from longshadow.engine.runtime.state import LayerSequence, SequenceState
from longshadow.engine.shadowkv.attention import AttendingCache, AttendingLayer, announce
from longshadow.engine.shadowkv.decode_batch import DecodeBatch
from longshadow.engine.shadowkv.exact import AttentionParameters, OnlineSoftmax
from longshadow.engine.shadowkv.sequence import RotationTable, Sequence
from longshadow.engine.shadowkv.shared_decode import attend_tokens
from longshadow.engine.shadowkv.shared_prompt import begin_together
from longshadow.engine.shadowkv.storage import ExactTokens


@dataclass(eq=False, kw_only=True)
class Chunk:
    """Some tokens of a prompt.

    Attributes:
        is_last: the prompt ends here, so it is compressed.
        num_prompt: tokens of the whole prompt, to make room for.
        keeps_head: leave the whole prompt's exact tokens in `head`, a buffer per layer.
        mask: of the chunk's tokens over all parked ones, the same for all layers.
    """

    state: SequenceState
    tokens: list[int]
    is_last: bool
    num_prompt: int
    keeps_head: bool = False
    head: list[ExactTokens] = field(default_factory=list)
    mask: torch.Tensor | None = None


@dataclass(eq=False)
class Work:
    """What the current forward computes: chunks of prompts, laid end to end, or one token of each sequence.

    Attributes:
        decoding: the sequence of each row, None for padding.
        batch: where their layers with full attention decode together; everything is prepared for that.
    """

    chunks: Sequence_[Chunk] = ()
    decoding: Sequence_[SequenceState | None] = ()
    batch: DecodeBatch | None = None

    @contextmanager
    def read(self, chunks: Sequence_[Chunk]) -> Iterator[None]:
        """Within, forwards read chunks."""
        self.chunks = chunks
        try:
            yield
        finally:
            self.chunks = ()

    @contextmanager
    def decode(self, states: Sequence_[SequenceState | None], batch: DecodeBatch | None = None) -> Iterator[None]:
        """Within, forwards decode."""
        self.decoding, self.batch = states, batch
        try:
            yield
        finally:
            self.decoding, self.batch = (), None


class BatchLayer(AttendingLayer):
    """One layer of the batch; holds no tokens itself."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        index: int,
        module: nn.Module,
        work: Work,
        rotations: RotationTable,
        *,
        place_in_batch: int | None,
        parks_on_host: bool,
    ) -> None:
        """`place_in_batch`: its number among the layers that decode together, None for a sliding window."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = place_in_batch is None
        self._place_in_batch = place_in_batch
        self.is_initialized = True
        self._index, self._module, self._work = index, module, work
        self._rotations = rotations
        self._parking_place = torch.device("cpu") if parks_on_host else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: sequences come with the work."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announces new post-RoPE keys and values and returns them, the keys marked with this layer."""
        return announce(self._module, self, key_states), value_states

    def forget_handoff(self) -> None:
        """Nothing: a forward that was given up leaves nothing here."""

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        parameters: AttentionParameters,
    ) -> torch.Tensor:
        """Attention and caching of the work's tokens: query [B, Hq, T, D] -> [B, Hq, T, Dv].

        B = 1 with the chunks along T, or T = 1 with a sequence, or padding, per row.
        """
        if self._work.chunks:
            return self._read(query[0], keys[0], values[0], parameters).unsqueeze(0)
        if self._work.batch is not None and self._place_in_batch is not None:
            new = query.squeeze(2), keys.squeeze(2), values.squeeze(2)
            return self._work.batch.attend(self._place_in_batch, *new, parameters).unsqueeze(2)
        out = query.new_zeros(*query.shape[:3], values.shape[3])
        compressed: dict[int, Sequence] = {}
        for row, state in enumerate(self._work.decoding):
            if state is None:
                continue
            sequence = state.layers[self._index]
            sequence.append(keys[row], values[row], self._rotations)
            if isinstance(sequence, Sequence):
                compressed[row] = sequence
            else:
                out[row, :, 0] = sequence.attend_token(query[row, :, 0], parameters)
        if compressed:
            rows = list(compressed)
            out[rows, :, 0] = attend_tokens([*compressed.values()], query[rows, :, 0], parameters)
        return out

    def _read(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parameters: AttentionParameters
    ) -> torch.Tensor:
        """Chunks of prompts, [Hq, T, D] -> [Hq, T, Dv]."""
        outputs = []
        lengths = [len(chunk.tokens) for chunk in self._work.chunks]
        queries = query.split(lengths, dim=1)
        begun = self._begin_together(queries, values.shape[2], parameters)
        pieces = zip(self._work.chunks, queries, keys.split(lengths, dim=1), values.split(lengths, dim=1), strict=True)
        for (chunk, q, k, v), online in zip(pieces, begun, strict=True):
            sequence = chunk.state.layers[self._index]
            if attends_parked(sequence, q, parameters):
                outputs.append(self._read_parked(sequence, chunk, q, k, v, parameters))
                continue
            if isinstance(sequence, Sequence):
                outputs.append(sequence.attend_prompt(q, k, v, parameters, begun=online))
            else:
                outputs.append(sequence.attend_prompt(q, k, v, parameters))
            if chunk.is_last and not chunk.keeps_head:
                sequence.finish_prompt(k, v, self._rotations)
                continue
            self._park(sequence, k, v, chunk.num_prompt)
            if chunk.is_last:
                self._finish_parked(sequence, chunk, k, v)
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]

    def _begin_together(
        self, queries: Sequence_[torch.Tensor], value_dim: int, parameters: AttentionParameters
    ) -> list[OnlineSoftmax | None]:
        sequences = [chunk.state.layers[self._index] for chunk in self._work.chunks]
        full = [sequence for sequence in sequences if isinstance(sequence, Sequence)]
        # A layer's sequences are all of one kind.
        return begin_together(full, queries, value_dim, parameters) if full else [None] * len(sequences)

    def _read_parked(
        self,
        sequence: LayerSequence,
        chunk: Chunk,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        parameters: AttentionParameters,
    ) -> torch.Tensor:
        """A chunk whose history is parked: parks it, too, then attends to what is parked."""
        assert isinstance(sequence, Sequence) and sequence.parked is not None
        if sequence.config.query_weighted:
            sequence.query_energy.add(query, keys.shape[0])
        sequence.park(keys, values)
        if chunk.mask is None:
            chunk.mask = causal_mask(query.shape[1], sequence.parked.num_tokens, query.device)
        out = attend_parked(query, sequence.parked, chunk.mask, parameters)
        if chunk.is_last:
            self._finish_parked(sequence, chunk, keys, values)
        return out

    def _finish_parked(self, sequence: LayerSequence, chunk: Chunk, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Ends a prompt all of which is parked; `keys` and `values` [H, T, D] only tell what empty ones are like."""
        assert sequence.parked is not None
        if chunk.keeps_head:
            chunk.head.append(sequence.parked)
        sequence.finish_prompt(keys[:, :0], values[:, :0], self._rotations)

    def _park(self, sequence: LayerSequence, keys: torch.Tensor, values: torch.Tensor, num_prompt: int) -> None:
        if sequence.parked is None:
            sequence.device = keys.device
            sequence.parked = ExactTokens(device=self._parking_place, capacity=num_prompt)
        sequence.park(keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset): masks are not used."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: positions are given with the tokens."""
        return 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1: no limit (the name of `get_max_length` before transformers 5.18)."""
        return -1


class BatchCache(AttendingCache):
    """A transformers cache whose sequences are those of `work`."""

    def __init__(self, layers: list[BatchLayer], work: Work) -> None:
        super().__init__(layers=[*layers])
        self.work = work
