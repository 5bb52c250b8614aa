"""`top_chunks`: one short pass over each row, so bound by launches; the scores of a row are read from a cache.

A step calls it twice, to choose candidate chunks among all and selected tokens among the candidates'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.ops.case import BATCH_SIZES, Case, Random
from bench.record import Check
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.ops.backend import REFERENCE, Operators

MAXIMUM_LAYERS = 64
# Softmax over logits with this standard deviation, in nats, has the few large weights that attention has.
SPREAD = 3.0


@dataclass(frozen=True, kw_only=True)
class TopCase(Case):
    """Which of the two calls."""

    of_tokens: bool

    @property
    def num_scores(self) -> int:
        """Scores of a row."""
        return self.num_candidates * self.chunk_size if self.of_tokens else self.num_chunks

    @property
    def num_chosen(self) -> int:
        """Places that are chosen in each row."""
        return self.num_selected * self.chunk_size if self.of_tokens else self.num_candidates


def cases() -> tuple[TopCase, ...]:
    """Both calls at every batch size."""
    return tuple(
        TopCase(
            name=f"122K, batch {batch_size}, {'tokens' if of_tokens else 'chunks'}",
            batch_size=batch_size,
            of_tokens=of_tokens,
        )
        for of_tokens in (False, True)
        for batch_size in BATCH_SIZES
    )


class TopChunks:
    """The operator over some layers; see `bench.ops.case.Work`."""

    def __init__(self, case: TopCase, device: torch.device, seed: int) -> None:
        random = Random(device, seed)
        heads = (case.batch_size, case.num_kv_heads)
        layer_bytes = 4 * heads[0] * heads[1] * (case.num_scores + case.num_chosen)
        self.num_layers = min(MAXIMUM_LAYERS, case.num_layers(layer_bytes))
        self.num_bytes = self.num_layers * layer_bytes
        self.flops = 0
        logits = random.normal(self.num_layers, *heads, case.num_scores, dtype=torch.float32)
        self._scores = logits.mul_(SPREAD).softmax(-1)
        self._counts = torch.full((heads[0],), case.num_chosen, dtype=torch.int32, device=device)
        self._chosen = torch.zeros(*heads, case.num_chosen, dtype=torch.int32, device=device)

    def run(self, operators: Operators) -> None:
        """One call per layer."""
        for scores in self._scores:
            self._call(operators, scores)

    def run_topk(self) -> None:
        """torch's choice of as many places in each row."""
        for scores in self._scores:
            scores.topk(self._chosen.shape[2], sorted=False)

    def _call(self, operators: Operators, scores: torch.Tensor) -> None:
        operators.top_chunks(scores, self._counts, self._chosen)

    def check(self, operators: Operators) -> Check:
        """The first layer's places against the reference's."""
        self._call(operators, self._scores[0])
        chosen = self._chosen.clone()
        self._call(choose_operators(self._chosen.device, REFERENCE), self._scores[0])
        differing = int((chosen != self._chosen).sum())
        return Check(
            passed=differing == 0,
            max_error=None,
            text=f"{differing} of {chosen.numel()} places differ from the reference's",
        )


def make(case: TopCase, device: torch.device, seed: int) -> TopChunks:
    """The operator's work on random weights."""
    return TopChunks(case, device, seed)
