"""Batches of sequences that decode together by operators: everything about a step that needs the host.

`prepare` compresses tails, enlarges buffers and writes tables, once per step for all layers; `attend`, layer by layer,
only launches what `DeviceStep` does, so that launches captured once can be replayed after every `prepare`.

Legend: B places of the batch, Hq query heads, H KV heads, D head_dim of keys, V of values.
"""

from collections.abc import Callable
from collections.abc import Sequence as Sequence_

import torch

from longshadow.engine.ops import Operators
from longshadow.engine.shadowkv.batch_memory import BatchMemory
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.decode import StepCounts
from longshadow.engine.shadowkv.device_step import DeviceStep
from longshadow.engine.shadowkv.exact import AttentionParameters
from longshadow.engine.shadowkv.place import Column, Place
from longshadow.engine.shadowkv.selection import StepSizes, step_sizes
from longshadow.engine.shadowkv.sequence import RotationTable, Sequence
from longshadow.engine.shadowkv.step_buffers import Capacity, Geometry
from longshadow.engine.shadowkv.step_tables import StepNumbers

MAXIMUM_CANDIDATES = 4096
NOTHING = StepSizes(num_selected=0, num_candidates=0, num_slots=0)
# The rotations of a layer's sequence at a place of the batch.
Rotations = Callable[[int, int], RotationTable]


class DecodeBatch:
    """Sequences that take one token each per step, in all layers of a model.

    A sequence that stays in the batch keeps its resident chunks, wherever its place.
    """

    def __init__(self, operators: Operators, config: ShadowKVConfig, device: torch.device) -> None:
        """`operators` for tensors on `device`. Raises ValueError for a configuration that they do not serve."""
        if config.key_store == "exact":
            raise ValueError("operators rebuild keys from low-rank factors, and key_store is 'exact'")
        self._config = config
        self._device = device
        self._device_step = DeviceStep(operators, config, device)
        self._memory = BatchMemory(config, device)
        self.reset()

    def reset(self) -> None:
        """Forgets all sequences and frees the memory they decoded in."""
        self._step = 0
        self._held: tuple[int, Capacity] | None = None
        self._places: list[Place | None] = []
        self._origins: list[int | None] | None = None
        self._memory.clear()
        self._selects = False
        self._num_misses: torch.Tensor | None = None  # of the steps before
        self._num_candidates = 0
        self._misses_are_new = False

    @property
    def signature(self) -> tuple[int, bool]:
        """As long as it is the same, `attend` launches the same operators on the same memory."""
        return self._memory.version, self._selects

    def hold(self, batch_size: int, room: Capacity) -> None:
        """From now on its memory is of this size, whatever its sequences need, who need no more.

        Where that is another size than before, what was held is free on return.
        """
        if (batch_size, room) != self._held:
            self._add_up_misses()
            self._held = batch_size, room
            self._memory.clear()

    def vacate(self, index: int) -> None:
        """Lets the sequence at a place go: nothing of it is kept, or pointed to."""
        self._places[index] = None
        if self._memory.tables is not None:
            self._memory.tables.clear(index)

    def prepare(self, layers: Sequence_[Sequence_[Sequence | None]], rotations: Rotations) -> bool:
        """Makes one more token of every sequence possible, and counts it; `attend` of each layer then takes it.

        `layers`: the sequences [layers][B], each with some tokens; None is a place without one. Returns whether
        tokens were compressed. Raises ValueError, with no token counted, where operators cannot read a sequence.
        """
        self._add_up_misses()
        columns = [tuple(part for part in column if part is not None) for column in zip(*layers, strict=True)]
        origins, vacated = self._seat(columns)
        changed, compressed = self._make_room(rotations)
        sizes = [NOTHING if place is None else self._sizes(place) for place in self._places]
        try:
            self._reserve(sizes, origins, changed, vacated)
        except ValueError:
            self.reset()
            raise
        assert self._memory.tables is not None
        self._step += 1
        numbers = [self._count(place, size) for place, size in zip(self._places, sizes, strict=True)]
        self._selects = self._misses_are_new = any(row.num_candidates for row in numbers)
        self._memory.tables.begin_step(self._step, numbers)
        return compressed

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        parameters: AttentionParameters,
    ) -> torch.Tensor:
        """Attention of the new tokens, query [B, Hq, D], keys [B, H, D], values [B, H, V]: [B, Hq, V].

        Their keys and values go into the tails. Places without a sequence get whatever they get.
        """
        memory = self._memory.of_layer(layer, query.shape[1])
        grouped = query.contiguous().unflatten(1, (keys.shape[1], -1))
        out = self._device_step.attend(
            grouped, keys.contiguous(), values.contiguous(), parameters, memory, selects=self._selects
        )
        return out.flatten(1, 2)

    def rearrange(self, origins: list[int]) -> None:
        """The sequences to come are copies: that at place b takes over the resident chunks of place origins[b]."""
        before: Sequence_[int | None] = self._origins or range(len(self._places))
        self._origins = [before[origin] for origin in origins] if self._places else None

    def add_hits_to(self, counts: StepCounts) -> None:
        """Adds the hits and misses since the last call; this waits for the device."""
        self._add_up_misses()
        num_misses = 0 if self._num_misses is None else int(self._num_misses)
        counts.misses += num_misses
        counts.hits += self._num_candidates - num_misses
        self._num_misses, self._num_candidates = None, 0

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What is held in memory, by part."""
        parts = self._memory.tensors()
        parts["decode step"] += [] if self._num_misses is None else [self._num_misses]
        return parts

    def _seat(self, columns: list[Column]) -> tuple[list[int | None], list[int]]:
        """Gives the sequences their places. Returns where each was before, None if nowhere, and places left empty."""
        old = {id(place.sequences[0]): index for index, place in enumerate(self._places) if place is not None}
        origins = self._origins or [old.get(id(column[0])) if column else None for column in columns]
        self._origins = None
        held = self._places if len(columns) == len(self._places) else [None] * len(columns)
        self._places = [
            place if place is not None and place.holds(column) else Place(column) if column else None
            for place, column in zip(held, columns, strict=True)
        ]
        vacated = [index for index, place in enumerate(held) if place is not None and self._places[index] is None]
        return origins, vacated

    def _make_room(self, rotations: Rotations) -> tuple[list[int], bool]:
        """Places whose sequences are not where their tables say, and whether one of them was compressed."""
        changed, compressed = [], False
        for index, place in enumerate(self._places):
            if place is None:
                continue
            num_segments = len(place.sequences[0].segments)
            place.sequences[0].make_room(rotations(0, index))
            if place.look():
                for layer, sequence in enumerate(place.sequences[1:], start=1):
                    sequence.make_room(rotations(layer, index))
                changed.append(index)
                compressed |= len(place.sequences[0].segments) != num_segments
        return changed, compressed

    def _sizes(self, place: Place) -> StepSizes:
        num_context = place.num_compressed + place.sequences[0].tail.num_tokens + 1
        num_available = place.num_chunks - place.num_exact_chunks
        return step_sizes(self._config, num_context, num_available, self._device)

    def _reserve(
        self, sizes: list[StepSizes], origins: list[int | None], changed: list[int], vacated: list[int]
    ) -> None:
        """Has enough memory at hand, moves resident chunks along with their sequences, and writes the tables."""
        places = [place for place in self._places if place is not None]
        needed = Capacity(
            num_segments=max(len(place.sequences[0].segments) for place in places),
            num_chunks=max(place.num_chunks for place in places),
            num_candidates=max(size.num_candidates for size in sizes),
            num_selected=max(size.num_selected for size in sizes),
            num_slots=max(max(size.num_slots, size.num_candidates) for size in sizes),
        )
        if self._held is not None:
            batch_size, room = self._held
            assert batch_size == len(sizes) and room.holds(needed), "the batch was told to hold less"
            needed = room
        if needed.num_candidates > MAXIMUM_CANDIDATES:
            raise ValueError(f"operators choose among up to {MAXIMUM_CANDIDATES} chunks, not {needed.num_candidates}")
        moved = any(
            place is not None and origin != index
            for index, (place, origin) in enumerate(zip(self._places, origins, strict=True))
        )
        if not self._memory.holds(needed, len(sizes)):
            self._memory.enlarge(needed, [self._geometry(part) for part in places[0].sequences], origins)
            changed = [index for index, place in enumerate(self._places) if place is not None]
        elif moved:
            self._memory.rearrange(origins)
        assert self._memory.tables is not None
        for index in changed:
            place = self._places[index]
            assert place is not None
            self._memory.tables.assign(index, [(part.segments, part.tail) for part in place.sequences])
        for index in vacated:
            self._memory.tables.clear(index)

    def _geometry(self, sequence: Sequence) -> Geometry:
        keys, values = sequence.tail.keys, sequence.tail.values
        return Geometry(
            num_kv_heads=keys.shape[0],
            key_dim=keys.shape[2],
            value_dim=values.shape[2],
            chunk_size=self._config.chunk_size,
            layout=sequence.layout,
            dtype=keys.dtype,
            device=self._device,
        )

    def _count(self, place: Place | None, sizes: StepSizes) -> StepNumbers:
        """Counts a sequence's new token, in all layers, and what the step does with it."""
        if place is None:
            return StepNumbers()
        for sequence in place.sequences:
            sequence.tail.num_tokens += 1
        tail_tokens, chunk_size = place.sequences[0].tail.num_tokens, self._config.chunk_size
        place.sequences[0].counts.add(
            sizes,
            num_context=place.num_compressed + tail_tokens,
            num_exact=place.num_exact_chunks * chunk_size + tail_tokens,
            chunk_size=chunk_size,
            num_layers=len(place.sequences),
        )
        self._num_candidates += sizes.num_candidates * self._memory.num_heads
        return StepNumbers(
            num_candidates=sizes.num_candidates,
            num_tokens=sizes.num_selected * chunk_size,
            tail_tokens=tail_tokens,
        )

    def _add_up_misses(self) -> None:
        """Adds the last step's misses to those before, on the device."""
        if self._misses_are_new and self._memory.misses is not None:
            added = self._memory.misses.sum()
            self._num_misses = added if self._num_misses is None else self._num_misses + added
        self._misses_are_new = False
