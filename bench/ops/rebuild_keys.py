"""`rebuild_keys`: bound by memory: a factor row and its angles per missing token, and the key that is written.

Heads choose their chunks independently here, so that a row is seldom read for two of them: the worst case. Products
take a fifth of the time that the bytes do on an H200.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bench.ops.case import BATCH_SIZES, MISS_RATE, Case, Random, compare
from bench.record import Check
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.ops.backend import REFERENCE, Operators
from longshadow.engine.ops.rotary import RotaryStyle
from longshadow.engine.ops.tables import Field, RowKind

# Keys are rounded to bf16, 8 bits, on one side before the rotation, too.
TOLERANCE = 2e-2
KINDS = (RowKind.MODEL, RowKind.INT8, RowKind.FP8)


def cases() -> tuple[Case, ...]:
    """Every kind of factors at every batch size."""
    return tuple(
        Case(
            name=f"122K, batch {batch_size}, {'bf16' if kind == RowKind.MODEL else kind.name.lower()}",
            batch_size=batch_size,
            kind=kind,
        )
        for kind in KINDS
        for batch_size in BATCH_SIZES
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """One layer's inputs and slots. `held` keeps alive what the table points to."""

    table: torch.Tensor
    chosen: torch.Tensor
    slots: torch.Tensor
    misses: torch.Tensor
    num_misses: torch.Tensor
    key_slots: torch.Tensor
    held: list[torch.Tensor | None] = field(repr=False)


class RebuildKeys:
    """The operator over some layers; see `bench.ops.case.Work`."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        random = Random(device, seed)
        self._case = case
        self._num_missing = round(MISS_RATE * case.num_candidates)
        num_heads = case.batch_size * case.num_kv_heads
        num_keys = num_heads * self._num_missing * case.chunk_size
        # Chunks that at least one head of a sequence misses.
        read_share = 1 - (1 - self._num_missing / case.num_chunks) ** case.num_kv_heads
        num_rows = round(case.batch_size * case.num_chunks * read_share) * case.chunk_size
        element = case.dtype.itemsize
        row_bytes = case.rank * case.kind.dtype(case.dtype).itemsize + (4 if case.kind else 0)
        angle_bytes = case.head_dim * element
        basis_bytes = num_heads * case.rank * case.head_dim * element
        layer_bytes = num_rows * (row_bytes + angle_bytes) + num_keys * case.head_dim * element + basis_bytes
        self.num_layers = case.num_layers(layer_bytes)
        self.num_bytes = self.num_layers * layer_bytes
        self.flops = self.num_layers * num_keys * case.rank * case.head_dim * 2
        # One rotation for all layers, as sequences have.
        angles = random.normal(case.batch_size, case.context_tokens, case.head_dim // 2, dtype=torch.float32).mul_(100)
        self._angles = angles.cos().to(case.dtype), angles.sin().to(case.dtype)
        self._layers = [self._make_layer(random) for _ in range(self.num_layers)]

    def _make_layer(self, random: Random) -> Layer:
        case, rows, held = self._case, [], []
        for cos, sin in zip(*self._angles, strict=True):
            shape = (case.num_chunks, case.chunk_size, case.rank)
            coefficients, scales = random.packed(*shape, kind=case.kind, dtype=case.dtype)
            basis = random.normal(case.num_kv_heads, case.rank, case.head_dim, dtype=case.dtype) * case.rank**-0.5
            mean = random.normal(case.num_kv_heads, case.head_dim, dtype=case.dtype)
            row = [0] * len(Field)
            row[Field.NUM_CHUNKS], row[Field.RANK] = case.num_chunks, case.rank
            row[Field.COEFFICIENTS] = coefficients.data_ptr()
            row[Field.COEFFICIENT_SCALES] = 0 if scales is None else scales.data_ptr()
            row[Field.BASIS], row[Field.MEAN] = basis.data_ptr(), mean.data_ptr()
            row[Field.COS], row[Field.SIN] = cos.data_ptr(), sin.data_ptr()
            rows.append([row])
            held += [coefficients, scales, basis, mean]
        heads, count = (case.batch_size, case.num_kv_heads), case.num_candidates
        num_rows = heads[0] * heads[1]
        misses = random.choose(num_rows, self._num_missing, count).sort(1).values
        padding = misses.new_full((num_rows, count - self._num_missing), -1)
        return Layer(
            table=torch.tensor(rows, device=random.device),
            # `top_chunks` gives them in ascending order.
            chosen=random.choose(num_rows, count, case.num_chunks).sort(1).values.view(*heads, count),
            slots=random.choose(num_rows, count, count).view(*heads, count),
            misses=torch.cat([misses, padding], 1).view(*heads, count),
            num_misses=misses.new_full(heads, self._num_missing),
            key_slots=torch.zeros(
                *heads, count, case.chunk_size, case.head_dim, dtype=case.dtype, device=random.device
            ),
            held=held,
        )

    def run(self, operators: Operators) -> None:
        """One call per layer."""
        for layer in self._layers:
            self._call(operators, layer)

    def _call(self, operators: Operators, layer: Layer) -> None:
        lists = (layer.chosen, layer.slots, layer.misses, layer.num_misses)
        how = (int(self._case.kind), int(RotaryStyle.HALF), self._case.head_dim)
        operators.rebuild_keys(layer.table, *lists, *how, layer.key_slots, False)

    def check(self, operators: Operators) -> Check:
        """The first layer's slots against the reference's."""
        layer = self._layers[0]
        self._call(operators, layer)
        keys = layer.key_slots.clone()
        self._call(choose_operators(keys.device, REFERENCE), layer)
        return compare(keys, layer.key_slots, TOLERANCE, "keys")


def make(case: Case, device: torch.device, seed: int) -> RebuildKeys:
    """The operator's work on random factors, a slot for each candidate."""
    return RebuildKeys(case, device, seed)
