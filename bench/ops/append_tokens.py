"""`append_tokens`: two vectors per sequence and head, so bound by the launch."""

from __future__ import annotations

import torch

from bench.ops.case import BATCH_SIZES, Case, Random, Regions, compare
from bench.record import Check
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.ops.backend import REFERENCE, Operators

# The tails of so many layers at least: one call is too short to be timed alone.
MINIMUM_LAYERS = 16


def cases() -> tuple[Case, ...]:
    """Every batch size."""
    return tuple(Case(name=f"122K, batch {batch_size}", batch_size=batch_size) for batch_size in BATCH_SIZES)


class AppendTokens:
    """The operator over some layers; see `bench.ops.case.Work`. Each run writes the same place of each tail."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        random = Random(device, seed)
        heads = (case.batch_size, case.num_kv_heads)
        # A vector and its place, for keys and for values.
        layer_bytes = 2 * heads[0] * heads[1] * 2 * case.head_dim * case.dtype.itemsize
        self.num_layers = MINIMUM_LAYERS if case.working_set else 1
        self.num_bytes = self.num_layers * layer_bytes
        self.flops = 0
        self._keys, self._values = random.normal(2, *heads, case.head_dim, dtype=case.dtype).unbind(0)
        lengths = [case.tail_tokens + 1 for _ in range(case.batch_size)]
        self._tail_tokens = torch.tensor(lengths, dtype=torch.int32, device=device)
        self._layers = [Regions(case, random) for _ in range(self.num_layers)]

    def run(self, operators: Operators) -> None:
        """One call per layer."""
        for regions in self._layers:
            operators.append_tokens(self._keys, self._values, self._tail_tokens, regions.table)

    def check(self, operators: Operators) -> Check:
        """The first layer's tails against the reference's: data movement, so exactly."""
        regions, results = self._layers[0], []
        for side in (operators, choose_operators(self._keys.device, REFERENCE)):
            tails = regions.tokens[1]
            tails.zero_()
            side.append_tokens(self._keys, self._values, self._tail_tokens, regions.table)
            results.append(tails.clone())
        result, expected = results
        return compare(result, expected, 0.0, "tails")


def make(case: Case, device: torch.device, seed: int) -> AppendTokens:
    """The operator's work on random tokens."""
    return AppendTokens(case, device, seed)
