"""The memory of a batch that decodes together, in all layers: enlarged between steps, never within one.

Legend: B places of the batch, G query heads per KV head.
"""

from collections.abc import Sequence as Sequence_
from dataclasses import replace
from functools import lru_cache

import torch

from longshadow.engine.ops import RowKind
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.device_step import StepMemory
from longshadow.engine.shadowkv.step_buffers import Capacity, Geometry, ResidentSlots, StepScratch
from longshadow.engine.shadowkv.step_tables import StepTables

ROW_KINDS = {None: RowKind.MODEL, "int8": RowKind.INT8, "fp8": RowKind.FP8}


class BatchMemory:
    """Tables, resident chunks and scratch memory.

    Attributes:
        version: grows whenever any of it moves.
        tables: of all layers; None before the first `reserve`.
        misses: of the last step, by layer, place and head.
    """

    def __init__(self, config: ShadowKVConfig, device: torch.device) -> None:
        self.version = 0
        self._config = config
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Frees all of it."""
        self.version += 1
        self.tables: StepTables | None = None
        self.misses: torch.Tensor | None = None
        self._capacity = Capacity()
        self._geometries: list[Geometry] = []
        self._slots: list[ResidentSlots] = []
        self._scratch: dict[tuple[Geometry, int], StepScratch] = {}

    def holds(self, needed: Capacity, batch_size: int) -> bool:
        """Whether there is room."""
        return self.tables is not None and self.tables.batch_size == batch_size and self._capacity.holds(needed)

    def enlarge(self, needed: Capacity, geometries: list[Geometry], origins: Sequence_[int | None]) -> None:
        """Makes room for sequences of these shapes in each layer, with empty tables.

        Place b takes over the resident chunks of place origins[b].
        """
        self.version += 1
        batch_size = len(origins)
        self._capacity = self._capacity.grown_to(needed)
        self._geometries = geometries
        self.tables = StepTables(
            len(geometries),
            batch_size=batch_size,
            num_segments=self._capacity.num_segments,
            factors=ROW_KINDS[self._config.factor_dtype],
            values=ROW_KINDS[self._config.value_dtype],
            dtype=self._geometries[0].dtype,
            device=self._device,
        )
        self._scratch = {}
        sizes = [batch_size * geometry.num_kv_heads for geometry in self._geometries]
        self.misses = torch.zeros(sum(sizes), dtype=torch.int32, device=self._device)
        for layer, (geometry, misses) in enumerate(zip(self._geometries, self.misses.split(sizes), strict=True)):
            slots = ResidentSlots(self._capacity.num_slots, geometry, misses.view(batch_size, -1))
            if layer == len(self._slots):
                self._slots.append(slots)
            else:
                slots.take(self._slots[layer], origins)
                # A layer's old memory is free before the next one's is made.
                self._slots[layer] = slots

    def rearrange(self, origins: Sequence_[int | None]) -> None:
        """Place b gets the resident chunks of place origins[b], None none."""
        for slots in self._slots:
            slots.take(slots, origins)

    @property
    def num_heads(self) -> int:
        """KV heads of all layers."""
        return sum(geometry.num_kv_heads for geometry in self._geometries)

    def of_layer(self, layer: int, num_query_heads: int) -> StepMemory:
        """What a step of one layer works on."""
        assert self.tables is not None
        geometry = self._geometries[layer]
        num_groups = num_query_heads // geometry.num_kv_heads
        shape = (replace(geometry, layout=None), num_groups)
        if shape not in self._scratch:
            self._scratch[shape] = StepScratch(
                self.tables.batch_size,
                self._capacity,
                geometry,
                num_groups=num_groups,
                takes_all_tokens=self._config.candidate_factor == 1,
            )
        return StepMemory(
            tables=self.tables,
            table=self.tables.layers[layer],
            slots=self._slots[layer],
            scratch=self._scratch[shape],
            layout=geometry.layout,
        )

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What is held, by part."""
        others = [] if self.tables is None or self.misses is None else [*self.tables.tensors, self.misses]
        return {
            "resident": [tensor for slots in self._slots for tensor in slots.tensors],
            "decode step": [*others, *(tensor for scratch in self._scratch.values() for tensor in scratch.tensors)],
        }


@lru_cache(maxsize=256)
def batch_bytes(
    config: ShadowKVConfig, geometries: tuple[Geometry, ...], num_query_heads: int, room: Capacity, batch_size: int
) -> int:
    """What a batch of such layers takes that holds `room` for each place, everything that a step makes included.

    Found by making it on a device without memory.
    """
    nowhere = torch.device("meta")
    memory = BatchMemory(config, nowhere)
    memory.enlarge(room, [replace(geometry, device=nowhere) for geometry in geometries], [None] * batch_size)
    for layer in range(len(geometries)):
        memory.of_layer(layer, num_query_heads)
    return sum(tensor.nbytes for tensors in memory.tensors().values() for tensor in tensors)
