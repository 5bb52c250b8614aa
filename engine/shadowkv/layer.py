"""The ShadowKV layer of a transformers cache: a batch of sequences, and the hand-off from `update`.

`update` only announces new tokens; the attention function then calls `attend` with everything it knows.
"""

import weakref
from itertools import zip_longest
from statistics import fmean
from typing import Any

import torch
from transformers.utils import logging

from longshadow.engine.shadowkv.attention import AttendingLayer, announce
from longshadow.engine.shadowkv.exact import AttentionParameters
from longshadow.engine.shadowkv.families import AttentionLayer
from longshadow.engine.shadowkv.positions import EVERY_TOKEN, Rows
from longshadow.engine.shadowkv.query_weights import QueryEnergy
from longshadow.engine.shadowkv.rope import Rotation
from longshadow.engine.shadowkv.sequence import RotationTable, Sequence
from longshadow.engine.shadowkv.state import CacheState

logger = logging.get_logger(__name__)


class ShadowKVLayer(AttendingLayer):
    """Cache layer of one full-attention layer; sequences of a batch are stored apart and without padding."""

    is_sliding = False
    is_compileable = False
    is_croppable = False  # not always: `crop` refuses to cut a segment
    supports_early_init = False

    def __init__(self, state: CacheState, attention: AttentionLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._state = state
        self._attention = attention
        self._index = len(state.layers)
        state.layers.append(weakref.ref(self))
        self._num_seen = 0
        self._num_expected = 0
        self._num_last = 0
        self.sequences: list[Sequence] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes a sequence for each row of the batch."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.sequences = [self._new_sequence() for _ in range(key_states.shape[0])]
        self.is_initialized = True

    def _new_sequence(self) -> Sequence:
        return Sequence(
            config=self._state.config,
            layout=self._attention.layout,
            segment_tokens=self._state.segment_tokens,
            counts=self._state.counts,
            operators=self._state.operators,
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announces new post-RoPE keys and values [B, H, T, D] and returns only these, the keys marked.

        Raises RuntimeError where the hand-off to `attend` would be or was lost.
        """
        module_name = type(self._attention.module).__name__
        if self._num_expected:
            raise RuntimeError(
                f"{module_name} did not hand its keys to longshadow's attention (it copied them, or the last "
                "forward was interrupted): this model is not supported, or call cache.reset() and start over"
            )
        marked = announce(self._attention.module, self, key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._num_expected = key_states.shape[2]
        return marked, value_states

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        parameters: AttentionParameters,
    ) -> torch.Tensor:
        """Attention of the announced tokens and their caching.

        query [B, Hq, T, D]; keys, values [B, H, T, D]; mask [B, tokens so far] marks real tokens, None: all.
        Returns [B, Hq, T, Dv]; zeros for padding.
        """
        batch_size, num_heads, num_new, _ = query.shape
        if self._state.is_ahead:
            return self._attend_together(query, keys, values, parameters)
        rows = self._note_positions(batch_size, num_new, mask, position_ids)
        self._notice_chunks(num_new)
        if num_new == 1 and all(row is EVERY_TOKEN for row in rows) and self._state.prepare(self._num_seen):
            return self._attend_together(query, keys, values, parameters)
        out = query.new_zeros(batch_size, num_heads, num_new, values.shape[3])
        for index, sequence in enumerate(self.sequences):
            row = rows[index]
            q, k, v = query[index][:, row], keys[index][:, row], values[index][:, row]
            if q.shape[1]:
                out[index][:, row] = self._attend_sequence(index, sequence, q, k, v, parameters, num_new)
        self._num_expected = 0
        return out

    def _attend_together(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parameters: AttentionParameters
    ) -> torch.Tensor:
        """One token of every sequence, for which all is prepared."""
        assert self._state.batch is not None
        out = self._state.batch.attend(self._index, query.squeeze(2), keys.squeeze(2), values.squeeze(2), parameters)
        self._num_expected = 0
        return out.unsqueeze(2)

    def count_ahead(self) -> None:
        """One more token of every sequence, which `attend` will not count."""
        self._num_seen += 1
        self._num_last = 1

    def forget_handoff(self) -> None:
        """A forward that was given up will not hand its keys over."""
        self._num_expected = 0

    def _note_positions(
        self, batch_size: int, num_new: int, mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> Rows:
        positions = self._state.positions
        rows = positions.begin(self._num_seen, batch_size, num_new, mask)
        self._num_seen += num_new
        if self._attention.layout is not None and self._state.config.key_store == "low_rank":
            if position_ids is None:
                name = type(self._attention.module).__name__
                raise RuntimeError(f"{name} gets no position_ids: give them to the model, which hands none on itself")
            positions.log_rotation(self._attention.layer_type, position_ids)
        return rows

    def _notice_chunks(self, num_new: int) -> None:
        """Warns of what looks like a prompt in chunks that the configuration does not know of."""
        if num_new > 1 and num_new == self._num_last and num_new != self._state.config.prefill_chunk_size:
            logger.warning_once(
                f"two prompts of {num_new} tokens in a row: if they are chunks of one prompt, say so with "
                f"ShadowKVConfig(prefill_chunk_size={num_new}), or later chunks attend to compressed keys"
            )
        self._num_last = num_new

    def _attend_sequence(
        self,
        index: int,
        sequence: Sequence,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        parameters: AttentionParameters,
        num_new: int,
    ) -> torch.Tensor:
        """Attends and caches the real new tokens of one sequence: [Hq, n, D] -> [Hq, n, Dv]."""
        config, rotations = self._state.config, self.rotations(index)
        if num_new == config.prefill_chunk_size:
            out = sequence.attend_prompt(query, keys, values, parameters)
            sequence.park(keys, values)
            return out
        if num_new > 1 and not (config.sparse_prompts and sequence.segments):
            out = sequence.attend_prompt(query, keys, values, parameters)
            self._finish_prompt(sequence, keys, values, rotations)
            return out
        if sequence.parked is not None:
            self._finish_prompt(sequence, keys[:, :0], values[:, :0], rotations)
        outputs = []
        for token in range(query.shape[1]):
            num_segments = len(sequence.segments)
            sequence.append(keys[:, token : token + 1], values[:, token : token + 1], rotations)
            if len(sequence.segments) != num_segments:
                self._state.peak.observe()
            outputs.append(sequence.attend_token(query[:, token], parameters))
        return torch.stack(outputs, 1)

    def _finish_prompt(
        self, sequence: Sequence, keys: torch.Tensor, values: torch.Tensor, rotations: RotationTable
    ) -> None:
        parked = sequence.parked
        exact_bytes = keys.nbytes + values.nbytes
        if parked is not None and parked.num_tokens:
            exact_bytes += parked.keys.nbytes + parked.values.nbytes
        self._state.peak.observe()
        sequence.finish_prompt(keys, values, rotations)
        self._state.peak.observe(transient=exact_bytes)

    def finish_parked_prompts(self) -> None:
        """Compresses prompts whose last chunk turns out to have been the last."""
        for index, sequence in enumerate(self.sequences):
            if sequence.parked is not None:
                parked = sequence.parked
                keys, values = (part[:, :0].to(sequence.device) for part in (parked.keys, parked.values))
                self._finish_prompt(sequence, keys, values, self.rotations(index))

    def absorb(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        position_ids: torch.Tensor,
        query_energy: torch.Tensor | None,
    ) -> None:
        """Caches a prompt that was attended elsewhere: keys, values [B, H, T, D], without padding.

        query_energy [B, H, D]: squares of its queries, summed over the tokens and the query heads of each KV head.
        """
        self.lazy_initialization(keys, values)
        self._note_positions(keys.shape[0], keys.shape[2], None, position_ids)
        for index, sequence in enumerate(self.sequences):
            if query_energy is not None and self._state.config.query_weighted:
                sequence.query_energy = QueryEnergy(query_energy[index])
            self._finish_prompt(sequence, keys[index], values[index], self.rotations(index))

    def rotations(self, index: int) -> RotationTable:
        """The rotations of one sequence's tokens."""
        attention, positions = self._attention, self._state.positions

        def table(start: int, stop: int) -> Rotation | None:
            if attention.layout is None:
                return None
            return positions.rotation(attention.layer_type, index, start, stop, self.device)

        return table

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys a mask has to cover: all tokens, padding included."""
        return self._num_seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen so far, padding included."""
        return self._num_seen

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1: no limit (the name of `get_max_length` before transformers 5.18)."""
        return -1

    def reset(self) -> None:
        """Forgets all tokens."""
        self._num_seen = self._num_expected = self._num_last = 0
        self.sequences = []
        self.is_initialized = False

    def select(self, sequences: list[int]) -> None:
        """Keeps these sequences, in this order; copies of one sequence share its segments."""
        used: set[int] = set()
        chosen = []
        for index in sequences:
            sequence = self.sequences[index]
            chosen.append(sequence.copy() if index in used else sequence)
            used.add(index)
        self.sequences = chosen

    def energy_kept(self) -> list[float]:
        """Share of key energy in the factors of the first, second, ... segment, mean over the batch."""
        by_place = zip_longest(*([part.energy_kept for part in sequence.segments] for sequence in self.sequences))
        return [fmean(energy for energy in place if energy is not None) for place in by_place]

    def offload(self) -> None:
        """Refuses: the cache places its tensors itself."""
        raise ValueError("a ShadowKVCache keeps its values on the host itself; do not ask for cache offloading")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses: the layers of a cache share their positions, so `ShadowKVCache.crop` crops them together."""
        raise ValueError("crop the cache, not one of its layers: cache.crop(-n)")

    def drop_last(self, num_columns: int, num_tokens: list[int]) -> None:
        """Forgets the newest columns of the batch, of which each sequence has as many real tokens as `num_tokens`."""
        self._num_seen -= num_columns
        for sequence, fewer in zip(self.sequences, num_tokens, strict=True):
            sequence.drop_last(fewer)

    def copy(self, state: CacheState) -> "ShadowKVLayer":
        """A layer of the cache that `state` is of, which goes on independently and shares the segments."""
        copied = ShadowKVLayer(state, self._attention)
        copied._num_seen, copied._num_expected, copied._num_last = self._num_seen, self._num_expected, self._num_last
        if self.is_initialized:
            copied.dtype, copied.device, copied.is_initialized = self.dtype, self.device, True
            copied.sequences = [sequence.copy() for sequence in self.sequences]
            for sequence in copied.sequences:
                sequence.counts = state.counts
        return copied
