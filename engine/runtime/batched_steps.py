"""One token of every decoding sequence, all at once: by operators, and on a GPU by graphs that were captured before.

Legend: B places of the batch.
"""

from collections.abc import Sequence as Sequence_
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from longshadow.engine.runtime.batch import BatchCache
from longshadow.engine.runtime.batch_room import Room, batch_size
from longshadow.engine.runtime.seats import Seats
from longshadow.engine.runtime.state import SequenceState
from longshadow.engine.shadowkv.batch_memory import batch_bytes
from longshadow.engine.shadowkv.choice import why_not_ahead
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.decode import StepCounts
from longshadow.engine.shadowkv.decode_batch import DecodeBatch
from longshadow.engine.shadowkv.graphs import GraphedForward
from longshadow.engine.shadowkv.sequence import RotationTable, Sequence
from longshadow.engine.shadowkv.step_buffers import Geometry

logger = logging.get_logger(__name__)


class BatchedSteps:
    """Steps of `model` over the sequences that `batch` decodes together."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: ShadowKVConfig,
        batch: DecodeBatch,
        cache: BatchCache,
        geometries: dict[int, Geometry],
        rotations: Sequence_[RotationTable],
        counts: StepCounts,
    ) -> None:
        """`geometries`: of the layers that the batch decodes, by their number; `rotations`: of all layers."""
        self._batch, self._cache = batch, cache
        self._config, self._counts = config, counts
        self._geometries, self._rotations = geometries, rotations
        self._layers = list(geometries)
        self._num_query_heads = model.config.get_text_config(decoder=True).num_attention_heads
        self._device = model.device
        self._seats = Seats(batch.vacate)
        self._room: Room | None = None
        self._is_usable = True
        run: Any = model

        def forward(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            output = run(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits: torch.Tensor = output.logits
            return logits

        self._forward = forward
        reason = why_not_ahead(model, batch, has_windows=len(cache.layers) > len(geometries))
        self._graphed = GraphedForward(forward, model.device) if reason is None else None
        if reason is not None:
            logger.warning_once(f"decoding runs without CUDA graphs: {reason}")

    @property
    def batch(self) -> DecodeBatch:
        """The sequences as the operators see them."""
        return self._batch

    @property
    def captures(self) -> bool:
        """Whether steps are captured in graphs, whose results are kept."""
        return self._graphed is not None and self._device.type == "cuda"

    def hold(self, room: Room) -> None:
        """Gives the batch another size from the next step on; on return it holds nothing that exceeds it."""
        self._add_hits()
        self._room = room
        self._batch.hold(room.num_places, room.each)
        if self._graphed is not None:
            self._graphed.clear()

    def room_bytes(self, room: Room) -> int:
        """Exactly what a batch of this size takes on the device once it has taken a step."""
        geometries = tuple(self._geometries.values())
        return batch_bytes(self._config, geometries, self._num_query_heads, room.each, room.num_places)

    def step(self, states: Sequence_[SequenceState], tokens: Sequence_[int]) -> torch.Tensor | None:
        """Caches a token of each sequence; logits of the next ones, [sequences, vocabulary].

        None, with no token cached, once operators could not read a sequence: each decodes by itself from then on.
        What is reserved for the batch is then for the resident chunks that each has of its own.
        """
        if not self._is_usable:
            return None
        self._add_hits()
        num_places = batch_size(len(states)) if self._room is None else self._room.num_places
        places = self._seats.take(states, num_places)
        try:
            self._batch.prepare(
                [[self._part(state, layer) for state in self._seats.states] for layer in self._layers],
                lambda layer, place: self._rotations[self._layers[layer]],
            )
        except ValueError as error:
            logger.warning_once(f"sequences are decoded one by one: {error}")
            self._is_usable = False
            self.close()
            return None
        ids, positions = [[0]] * num_places, [[0]] * num_places
        for place, state, token in zip(places, states, tokens, strict=True):
            ids[place], positions[place] = [token], [state.num_tokens]
        inputs = torch.tensor(ids, device=self._device), torch.tensor(positions, device=self._device)
        with self._cache.work.decode(self._seats.states, self._batch):
            if self._graphed is None:
                logits = self._forward(*inputs)
            else:
                logits = self._graphed.run(*inputs, self._batch.signature)
        # A copy: the next step overwrites the graph's result.
        return logits[places, -1]

    def _part(self, state: SequenceState | None, layer: int) -> Sequence | None:
        part = None if state is None else state.layers[layer]
        assert part is None or isinstance(part, Sequence)
        return part

    def _add_hits(self) -> None:
        """Counts the hits of the steps before, which are over: nobody has to wait for them."""
        self._batch.add_hits_to(self._counts)

    def close(self) -> None:
        """Lets all sequences go and frees the batch's memory. Repeatable."""
        self._seats.clear()
        self._batch.reset()
        if self._graphed is not None:
            self._graphed.clear()
