"""`sparse_attention`: bound by one read of the selected tokens' and regions' keys and values, 12 MiB a sequence and
layer at 122K tokens: at batch 1 a launch takes longer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.ops.case import BATCH_SIZES, Case, Random, Regions, compare
from bench.record import Check
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.ops.backend import REFERENCE, Operators
from longshadow.engine.ops.sparse_attention import sparse_attention_workspace

# Outputs are rounded to bf16, 8 bits, and so are the weights on one side.
TOLERANCE = 1e-2


def cases() -> tuple[Case, ...]:
    """Every batch size."""
    return tuple(Case(name=f"122K, batch {batch_size}", batch_size=batch_size) for batch_size in BATCH_SIZES)


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """One layer's inputs."""

    query: torch.Tensor
    places: torch.Tensor
    key_slots: torch.Tensor
    value_slots: torch.Tensor
    regions: Regions


class SparseAttention:
    """The operator over some layers; see `bench.ops.case.Work`."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        random = Random(device, seed)
        self._case = case
        sizes = (case.batch_size, case.num_kv_heads, case.num_groups)
        num_places = case.num_selected * case.chunk_size
        self._out = torch.empty(*sizes, case.head_dim, dtype=case.dtype, device=device)
        self._lse = torch.empty(sizes, dtype=torch.float32, device=device)
        workspace = sparse_attention_workspace(*sizes, case.head_dim, num_places)
        self._workspace = torch.empty(workspace, dtype=torch.float32, device=device)
        num_regions = case.num_exact_chunks * case.chunk_size + case.tail_tokens
        num_tokens = case.batch_size * case.num_kv_heads * (num_places + num_regions)
        layer_bytes = num_tokens * 2 * case.head_dim * case.dtype.itemsize
        self.num_layers = case.num_layers(layer_bytes)
        self.num_bytes = self.num_layers * layer_bytes
        self.flops = self.num_layers * num_tokens * case.num_groups * case.head_dim * 4
        self._layers = [self._make_layer(random) for _ in range(self.num_layers)]

    def _make_layer(self, random: Random) -> Layer:
        case = self._case
        pairs, num_slots = (case.batch_size, case.num_kv_heads), case.num_candidates
        num_places = case.num_selected * case.chunk_size
        places = random.choose(pairs[0] * pairs[1], num_places, num_slots * case.chunk_size)
        key_slots, value_slots = random.normal(
            2, *pairs, num_slots, case.chunk_size, case.head_dim, dtype=case.dtype
        ).unbind(0)
        return Layer(
            query=random.normal(*pairs, case.num_groups, case.head_dim, dtype=case.dtype),
            # `top_chunks` gives them in ascending order.
            places=places.sort(1).values.view(*pairs, num_places),
            key_slots=key_slots,
            value_slots=value_slots,
            regions=Regions(case, random),
        )

    def run(self, operators: Operators) -> None:
        """One call per layer."""
        for layer in self._layers:
            self._call(operators, layer)

    def _call(self, operators: Operators, layer: Layer) -> None:
        inputs = (layer.query, layer.places, layer.key_slots, layer.value_slots, layer.regions.table, None)
        outputs = (self._out, self._lse, self._workspace)
        operators.sparse_attention(*inputs, self._case.scaling, 0.0, *outputs)

    def check(self, operators: Operators) -> Check:
        """The first layer's outputs against the reference's."""
        self._call(operators, self._layers[0])
        out = self._out.clone()
        self._call(choose_operators(self._out.device, REFERENCE), self._layers[0])
        return compare(out, self._out, TOLERANCE, "outputs")


def make(case: Case, device: torch.device, seed: int) -> SparseAttention:
    """The operator's work on random keys and values, three slots per selected chunk."""
    return SparseAttention(case, device, seed)
