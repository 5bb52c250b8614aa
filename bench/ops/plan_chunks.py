"""`plan_chunks`: some kilobytes for each row, so bound by launches.

Each run begins with one copy of all layers' slots as they were, so that every call has the same misses.
"""

from __future__ import annotations

import torch

from bench.ops.case import BATCH_SIZES, MISS_RATE, Case, Random
from bench.record import Check
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.ops.backend import REFERENCE, Operators

MAXIMUM_LAYERS = 64
STEP = 100
# Slots were last used in one of so many steps before.
AGES = 8


def cases() -> tuple[Case, ...]:
    """Every batch size."""
    return tuple(Case(name=f"122K, batch {batch_size}", batch_size=batch_size) for batch_size in BATCH_SIZES)


class PlanChunks:
    """The operator over some layers; see `bench.ops.case.Work`. A slot for each candidate, as the cache has it."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        random = Random(device, seed)
        heads, width = (case.batch_size, case.num_kv_heads), case.num_candidates
        num_rows, num_missing = heads[0] * heads[1], round(MISS_RATE * case.num_candidates)
        # Chosen chunks, slots and last uses are read, slots, misses and last uses written, and what the misses renew.
        layer_bytes = num_rows * (6 * 4 * width + num_missing * (4 + case.chunk_size) + 4)
        self.num_layers = min(MAXIMUM_LAYERS, case.num_layers(layer_bytes))
        self.num_bytes = self.num_layers * layer_bytes
        self.flops = 0
        chunks = random.choose(self.num_layers * num_rows, width + num_missing, case.num_chunks)
        shape = (self.num_layers, *heads, width)
        self._chosen = chunks[:, num_missing:].sort(1).values.view(shape)
        ages = random.choose(self.num_layers * num_rows, width, width) % AGES
        self._before = torch.stack([chunks[:, :width].reshape(shape), STEP - 1 - ages.view(shape)])
        self._state = self._before.clone()
        self._has_values = torch.ones(*shape, case.chunk_size, dtype=torch.uint8, device=device)
        self._step = torch.tensor([STEP], dtype=torch.int32, device=device)
        self._plan = torch.zeros(2, *shape[1:], dtype=torch.int32, device=device)
        self._num_misses = torch.zeros(heads, dtype=torch.int32, device=device)

    def run(self, operators: Operators) -> None:
        """One call per layer."""
        self._state.copy_(self._before)
        for layer in range(self.num_layers):
            self._call(operators, layer)

    def _call(self, operators: Operators, layer: int) -> None:
        state, flags = self._state[:, layer], self._has_values[layer]
        operators.plan_chunks(self._chosen[layer], *state, flags, self._step, *self._plan, self._num_misses)

    def check(self, operators: Operators) -> Check:
        """The first layer's plan and slots against the reference's."""
        results = []
        for side in (operators, choose_operators(self._step.device, REFERENCE)):
            self._state.copy_(self._before)
            self._has_values.fill_(1)
            self._call(side, 0)
            parts = (self._plan, self._num_misses, self._state[:, 0], self._has_values[0])
            results.append(torch.cat([part.flatten().int() for part in parts]))
        differing = int((results[0] != results[1]).sum())
        return Check(
            passed=differing == 0,
            max_error=None,
            text=f"{differing} of {results[0].numel()} numbers of the plan differ from the reference's",
        )


def make(case: Case, device: torch.device, seed: int) -> PlanChunks:
    """The operator's work on random chunks, four of ten missing."""
    return PlanChunks(case, device, seed)
