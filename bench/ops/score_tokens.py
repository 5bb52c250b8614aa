"""`score_tokens`: bound by one read of the candidates' and regions' keys, 13 MiB a sequence and layer at 122K."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.ops.case import BATCH_SIZES, Case, Random, Regions, compare
from bench.record import Check
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.ops.backend import REFERENCE, Operators
from longshadow.engine.ops.score_tokens import score_tokens_workspace

# Both sides sum 128 products in fp32; weights are exponentials of logits of about 10.
TOLERANCE = 1e-4


def cases() -> tuple[Case, ...]:
    """Every batch size."""
    return tuple(Case(name=f"122K, batch {batch_size}", batch_size=batch_size) for batch_size in BATCH_SIZES)


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """One layer's inputs."""

    query: torch.Tensor
    slots: torch.Tensor
    key_slots: torch.Tensor
    regions: Regions


class ScoreTokens:
    """The operator over some layers; see `bench.ops.case.Work`."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        random = Random(device, seed)
        self._case = case
        sizes = (case.batch_size, case.num_kv_heads, case.num_groups)
        num_tokens = case.num_candidates * case.chunk_size
        self._scores = torch.empty(*sizes[:2], num_tokens, dtype=torch.float32, device=device)
        workspace = score_tokens_workspace(*sizes, num_tokens)
        self._workspace = torch.empty(workspace, dtype=torch.float32, device=device)
        num_regions = case.num_exact_chunks * case.chunk_size + case.tail_tokens
        num_keys = case.batch_size * case.num_kv_heads * (num_tokens + num_regions)
        layer_bytes = num_keys * case.head_dim * case.dtype.itemsize + 4 * self._scores.numel()
        self.num_layers = case.num_layers(layer_bytes)
        self.num_bytes = self.num_layers * layer_bytes
        self.flops = self.num_layers * num_keys * case.num_groups * case.head_dim * 2
        self._layers = [self._make_layer(random) for _ in range(self.num_layers)]

    def _make_layer(self, random: Random) -> Layer:
        case = self._case
        pairs, count = (case.batch_size, case.num_kv_heads), case.num_candidates
        slots = random.choose(pairs[0] * pairs[1], count, count)
        return Layer(
            query=random.normal(*pairs, case.num_groups, case.head_dim, dtype=case.dtype),
            slots=slots.view(*pairs, count),
            key_slots=random.normal(*pairs, count, case.chunk_size, case.head_dim, dtype=case.dtype),
            regions=Regions(case, random),
        )

    def run(self, operators: Operators) -> None:
        """One call per layer."""
        for layer in self._layers:
            self._call(operators, layer)

    def _call(self, operators: Operators, layer: Layer) -> None:
        inputs = (layer.query, layer.slots, layer.key_slots, layer.regions.table, None)
        operators.score_tokens(*inputs, self._case.scaling, 0.0, self._scores, self._workspace)

    def check(self, operators: Operators) -> Check:
        """The first layer's scores against the reference's."""
        self._call(operators, self._layers[0])
        scores = self._scores.clone()
        self._call(choose_operators(self._scores.device, REFERENCE), self._layers[0])
        return compare(scores, self._scores, TOLERANCE, "scores")


def make(case: Case, device: torch.device, seed: int) -> ScoreTokens:
    """The operator's work on random keys, every slot a candidate's."""
    return ScoreTokens(case, device, seed)
