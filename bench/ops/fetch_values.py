"""`fetch_values`: bound by the link to the host, or by device memory where values are kept there.

From the host only the bytes on the link count. Each run begins with one copy that marks the tokens as missing again,
a byte per slot and token, 1 % of what is then fetched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.ops.case import BATCH_SIZES, MISS_RATE, Case, Random, compare
from bench.record import Check
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.ops.backend import REFERENCE, Operators
from longshadow.engine.ops.tables import Field, RowKind
from longshadow.engine.shadowkv.storage import RowDtype, RowStore


@dataclass(frozen=True, kw_only=True)
class FetchCase(Case):
    """Values in pinned host memory, or on the device; `kind` is theirs."""

    on_host: bool


def cases() -> tuple[FetchCase, ...]:
    """Both places and kinds at every batch size."""
    return tuple(
        FetchCase(
            name=f"122K, batch {batch_size}, {'bf16' if kind == RowKind.MODEL else 'int8'} on the {place}",
            batch_size=batch_size,
            kind=kind,
            on_host=place == "host",
        )
        for place in ("host", "device")
        for kind in (RowKind.MODEL, RowKind.INT8)
        for batch_size in BATCH_SIZES
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """One layer's slots and the places that are wanted."""

    slot_chunks: torch.Tensor
    places: torch.Tensor
    has_values: torch.Tensor
    value_slots: torch.Tensor


class FetchValues:
    """The operator over some layers; see `bench.ops.case.Work`. Layers share the values, but not the chunks."""

    def __init__(self, case: FetchCase, device: torch.device, seed: int) -> None:
        random = Random(device, seed)
        self._case = case
        heads = (case.batch_size, case.num_kv_heads)
        num_places = case.num_selected * case.chunk_size
        self._num_missing = round(MISS_RATE * num_places)
        row_bytes = case.head_dim * case.kind.dtype(case.dtype).itemsize + (4 if case.kind else 0)
        stored_bytes = 0 if case.on_host else case.head_dim * case.dtype.itemsize
        layer_bytes = heads[0] * heads[1] * self._num_missing * (row_bytes + stored_bytes)
        self.num_layers = case.num_layers(layer_bytes)
        self.num_bytes = self.num_layers * layer_bytes
        self.flops = self.num_layers * heads[0] * heads[1] * self._num_missing * case.head_dim if case.kind else 0
        self._stores = [self._make_store(random) for _ in range(case.batch_size)]
        self._table = torch.tensor([[self._row(store)] for store in self._stores], device=device)
        shape = (self.num_layers, *heads, case.num_candidates, case.chunk_size)
        self._had_values = torch.ones(shape, dtype=torch.uint8, device=device)
        self._has_values = torch.ones_like(self._had_values)
        self._layers = [self._make_layer(random, index) for index in range(self.num_layers)]

    def _make_store(self, random: Random) -> RowStore:
        case = self._case
        quantized: RowDtype | None = "int8" if case.kind == RowKind.INT8 else None
        values = random.normal(case.num_kv_heads * case.num_chunks, case.chunk_size, case.head_dim, dtype=case.dtype)
        return RowStore(values, quantized=quantized, host=case.on_host)

    def _row(self, store: RowStore) -> list[int]:
        row = [0] * len(Field)
        row[Field.NUM_CHUNKS], row[Field.VALUES] = self._case.num_chunks, store.rows.data_ptr()
        row[Field.VALUE_SCALES] = 0 if store.scales is None else store.scales.data_ptr()
        return row

    def _make_layer(self, random: Random, index: int) -> Layer:
        case, heads = self._case, (self._case.batch_size, self._case.num_kv_heads)
        num_rows, num_slots = heads[0] * heads[1], case.num_candidates
        num_places = case.num_selected * case.chunk_size
        places = random.choose(num_rows, num_places, num_slots * case.chunk_size)
        self._had_values[index].view(num_rows, -1).scatter_(1, places[:, : self._num_missing].long(), 0)
        return Layer(
            slot_chunks=random.choose(num_rows, num_slots, case.num_chunks).view(*heads, num_slots),
            # `top_chunks` gives them in ascending order.
            places=places.sort(1).values.view(*heads, num_places),
            has_values=self._has_values[index],
            value_slots=torch.zeros(
                *heads, num_slots, case.chunk_size, case.head_dim, dtype=case.dtype, device=random.device
            ),
        )

    def run(self, operators: Operators) -> None:
        """One call per layer."""
        self._has_values.copy_(self._had_values)
        for layer in self._layers:
            self._call(operators, layer)

    def _call(self, operators: Operators, layer: Layer) -> None:
        operators.fetch_values(
            self._table, layer.slot_chunks, layer.places, int(self._case.kind), layer.has_values, layer.value_slots
        )

    def check(self, operators: Operators) -> Check:
        """The first layer's slots against the reference's: data movement, so exactly."""
        layer = self._layers[0]
        results = []
        for side in (operators, choose_operators(self._table.device, REFERENCE)):
            self._has_values.copy_(self._had_values)
            layer.value_slots.zero_()
            self._call(side, layer)
            results.append(layer.value_slots.clone())
        return compare(*results, 0.0, "values")


def make(case: FetchCase, device: torch.device, seed: int) -> FetchValues:
    """The operator's work on random values, a slot for each candidate."""
    return FetchValues(case, device, seed)
