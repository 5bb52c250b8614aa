"""What the layers of one cache share, and the steps that all of them take at once."""

import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from longshadow.engine.ops import Operators
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.decode import StepCounts
from longshadow.engine.shadowkv.decode_batch import DecodeBatch
from longshadow.engine.shadowkv.memory import PeakMemory
from longshadow.engine.shadowkv.positions import TokenPositions

if TYPE_CHECKING:
    from longshadow.engine.shadowkv.layer import ShadowKVLayer

logger = logging.get_logger(__name__)


@dataclass(eq=False, kw_only=True)
class CacheState:
    """What the layers of one cache share.

    Attributes:
        layers: these layers, in the model's order; weakly, so that a cache that is dropped is freed at once.
        operators: what reads the keys of prompts; None: PyTorch.
        batch: decodes all sequences together, by operators; None where each is decoded by itself.
        is_ahead: the tokens of the forward to come are already counted, and prepared for, in all layers.
    """

    config: ShadowKVConfig
    positions: TokenPositions
    segment_tokens: int
    peak: PeakMemory
    counts: StepCounts = field(default_factory=StepCounts)
    layers: list[weakref.ref["ShadowKVLayer"]] = field(default_factory=list)
    operators: Operators | None = None
    batch: DecodeBatch | None = None
    is_ahead: bool = False
    _num_prepared: int = field(default=0, init=False)

    def prepare(self, num_seen: int) -> bool:
        """Whether the sequences can take the last of `num_seen` tokens together; then all layers are ready for it.

        The first layer of a forward does the work.
        """
        if self.batch is None:
            return False
        if self._num_prepared == num_seen:
            return True
        layers = self.living_layers
        # The last layer is the last to get this forward's tokens: what it holds, all hold.
        if not layers[-1].sequences or not all(sequence.num_tokens for sequence in layers[-1].sequences):
            return False
        if any(sequence.parked is not None for sequence in layers[-1].sequences):
            for layer in layers:
                layer.finish_parked_prompts()
        try:
            compressed = self.batch.prepare(
                [layer.sequences for layer in layers], lambda layer, place: layers[layer].rotations(place)
            )
        except ValueError as error:
            logger.warning_once(f"sequences are decoded one by one: {error}")
            self.batch = None
            return False
        if compressed:
            self.peak.observe()
        self._num_prepared = num_seen
        return True

    def begin_ahead(self, position_ids: torch.Tensor) -> bool:
        """Whether the next forward can be all but its launches now; it is until `end_ahead`. position_ids: [B or 1, 1].

        Every sequence gets a token, and `attend` only launches operators on memory that is there.
        """
        layers = self.living_layers
        if not self.prepare(layers[0].get_seq_length() + 1):
            return False
        self.positions.advance(position_ids)
        for layer in layers:
            layer.count_ahead()
        self.is_ahead = True
        return True

    def end_ahead(self) -> None:
        """The forward is over, or was given up."""
        self.is_ahead = False
        for layer in self.living_layers:
            layer.forget_handoff()

    @property
    def living_layers(self) -> list["ShadowKVLayer"]:
        """The layers."""
        return [layer for reference in self.layers if (layer := reference()) is not None]

    def copy(self, peak: PeakMemory, batch: DecodeBatch | None) -> "CacheState":
        """The state of a copy of the cache, still without layers."""
        if self.batch is not None:
            self.batch.add_hits_to(self.counts)
        return replace(
            self, positions=self.positions.copy(), counts=replace(self.counts), layers=[], peak=peak, batch=batch
        )

    def check_drop(self, num_columns: int) -> None:
        """Raises ValueError where a token in the newest columns of the batch is compressed."""
        layers = self.living_layers
        counts = self.positions.num_real_of_last(num_columns)
        recent = [[sequence.num_exact_recent for sequence in layer.sequences] for layer in layers]
        room = [min(of_sequence) for of_sequence in zip(*recent, strict=True)]
        if any(count > exact for count, exact in zip(counts, room, strict=True)):
            raise ValueError(
                f"cannot take back {num_columns} tokens: of the sequences' tokens only the last {room} are not "
                "compressed yet (more with a larger ShadowKVConfig.local_tokens)"
            )

    def drop_last(self, num_columns: int) -> None:
        """Forgets the newest columns of the batch in all layers, padding included, after `check_drop`."""
        counts = self.positions.drop_last(num_columns)
        for layer in self.living_layers:
            layer.drop_last(num_columns, counts)
        self._num_prepared = 0

    def reset(self) -> None:
        """Forgets all tokens; the layers forget theirs themselves."""
        self.positions.reset()
        self.peak.reset()
        self.counts = StepCounts()
        self.is_ahead, self._num_prepared = False, 0
        if self.batch is not None:
            self.batch.reset()
