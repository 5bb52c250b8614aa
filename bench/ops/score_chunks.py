"""`score_chunks`: bound by one read of the landmarks, 31 MiB a sequence and layer at 122K tokens in bf16, half in int8.

The kernel also writes and reads a logit per query head and chunk, 6 % more each in bf16, most of it in the L2 cache;
that is its own affair and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bench.ops.case import BATCH_SIZES, Case, Random, compare
from bench.record import Check
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.ops.backend import REFERENCE, Operators
from longshadow.engine.ops.score_chunks import score_chunks_workspace
from longshadow.engine.ops.tables import Field, RowKind

# Both sides sum 128 products in fp32; weights are exponentials of logits of about 10.
TOLERANCE = 1e-4
KINDS = (RowKind.MODEL, RowKind.INT8, RowKind.FP8)


def cases() -> tuple[Case, ...]:
    """Every kind of landmarks at every batch size."""
    return tuple(
        Case(name=f"122K, batch {batch_size}, {'bf16' if kind == RowKind.MODEL else kind.name.lower()}",
             batch_size=batch_size, kind=kind)
        for kind in KINDS
        for batch_size in BATCH_SIZES
    )  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """One layer's inputs. `held` keeps alive what the table points to."""

    query: torch.Tensor
    table: torch.Tensor
    held: list[torch.Tensor | None] = field(repr=False)


class ScoreChunks:
    """The operator over some layers; see `bench.ops.case.Work`."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        random = Random(device, seed)
        self._case = case
        sizes = (case.batch_size, case.num_kv_heads, case.num_groups)
        self._scores = torch.empty(*sizes[:2], case.num_chunks, dtype=torch.float32, device=device)
        workspace = score_chunks_workspace(*sizes, case.num_chunks)
        self._workspace = torch.empty(workspace, dtype=torch.float32, device=device)
        num_vectors = case.batch_size * case.num_kv_heads * case.num_chunks
        row_bytes = case.head_dim * case.kind.dtype(case.dtype).itemsize + (4 if case.kind else 0)
        layer_bytes = num_vectors * (row_bytes + 4)
        self.num_layers = case.num_layers(layer_bytes)
        self.num_bytes = self.num_layers * layer_bytes
        self.flops = self.num_layers * num_vectors * case.num_groups * case.head_dim * 2
        self._layers = [self._make_layer(random) for _ in range(self.num_layers)]

    def _make_layer(self, random: Random) -> Layer:
        case, rows, held = self._case, [], []
        shape = (case.num_kv_heads, case.num_chunks, case.head_dim)
        for _ in range(case.batch_size):
            landmarks, scales = random.packed(*shape, kind=case.kind, dtype=case.dtype)
            exact = random.choose(case.num_kv_heads, case.num_exact_chunks, case.num_chunks).long().sort(1).values
            row = [0] * len(Field)
            row[Field.NUM_CHUNKS], row[Field.NUM_EXACT] = case.num_chunks, case.num_exact_chunks
            row[Field.LANDMARKS], row[Field.EXACT_CHUNKS] = landmarks.data_ptr(), exact.data_ptr()
            row[Field.LANDMARK_SCALES] = 0 if scales is None else scales.data_ptr()
            rows.append([row])
            held += [landmarks, scales, exact]
        query = random.normal(case.batch_size, case.num_kv_heads, case.num_groups, case.head_dim, dtype=case.dtype)
        return Layer(query=query, table=torch.tensor(rows, device=random.device), held=held)

    def run(self, operators: Operators) -> None:
        """One call per layer."""
        for layer in self._layers:
            self._call(operators, layer)

    def _call(self, operators: Operators, layer: Layer) -> None:
        case = self._case
        operators.score_chunks(
            layer.query, layer.table, case.scaling, 0.0, int(case.kind), self._scores, self._workspace
        )

    def check(self, operators: Operators) -> Check:
        """The first layer's scores against the reference's."""
        self._call(operators, self._layers[0])
        scores = self._scores.clone()
        self._call(choose_operators(self._scores.device, REFERENCE), self._layers[0])
        return compare(scores, self._scores, TOLERANCE, "scores")


def make(case: Case, device: torch.device, seed: int) -> ScoreChunks:
    """The operator's work on random landmarks."""
    return ScoreChunks(case, device, seed)
