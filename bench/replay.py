"""Recorded choices played in larger contexts: a batch selects what a real model selected, scaled up.

Every chunk of the recording stands for `factor` chunks of the larger context, scattered over it at random, and for one
chosen token `factor` tokens are chosen: as large a share of the candidates stays from step to step as in the recording.
The operators still run, in full and with their own results; these are then overwritten, by launches alone, so that
steps can be captured in a CUDA graph.

Legend: R recorded rows, S recorded steps, B sequences, H KV heads, M candidate chunks, T selected tokens, c chunk size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from bench.traces import Traces
from longshadow.engine.ops import Operators


class Replay:
    """The choices of a batch of sequences in all layers of a model.

    Attributes:
        num_candidates, num_tokens: M and T, multiples of the recording's.
        free_chunks: chunk numbers that are never chosen, for sinks and outliers.
    """

    def __init__(
        self,
        traces: Traces,
        *,
        num_chunks: int,
        num_candidates: int,
        num_layers: int,
        num_heads: int,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        """Raises ValueError for a context of too few chunks, or candidates that are no multiple of the recording's."""
        factor, rest = divmod(num_candidates, traces.num_candidates)
        if factor == 0 or rest:
            raise ValueError(f"candidates must be a multiple of the recorded {traces.num_candidates}: {num_candidates}")
        recorded, numbers = traces.candidates.unique(return_inverse=True)
        if len(recorded) * factor > num_chunks:
            raise ValueError(f"{len(recorded)} recorded chunks, {factor} for each, do not fit into {num_chunks}")
        shuffled = torch.randperm(num_chunks, generator=torch.Generator().manual_seed(seed))
        images = shuffled[: len(recorded) * factor].view(len(recorded), factor)
        self.free_chunks = shuffled[len(recorded) * factor :].sort().values
        self.num_candidates, self.num_tokens = num_candidates, traces.num_tokens * factor
        self._chunk_size, self._num_layers = traces.chunk_size, num_layers

        chunks, order = images[numbers].flatten(2).sort(2)
        place, offset = traces.tokens // traces.chunk_size, traces.tokens % traces.chunk_size
        copies = place.unsqueeze(3) * factor + torch.arange(factor)
        places = order.argsort(2).gather(2, copies.flatten(2))
        tokens = (places * traces.chunk_size + offset.repeat_interleave(factor, 2)).sort(2).values
        self._chunks_RSM = chunks.int().to(device)
        self._places_RST = (tokens // traces.chunk_size).to(device)
        self._offsets_RST = (tokens % traces.chunk_size).int().to(device)
        rows = torch.arange(num_layers * num_heads).view(num_layers, 1, num_heads) % traces.num_rows
        self._rows_L1H = rows.to(device)
        # There and back, so that neighbours are always steps that followed each other.
        there = torch.arange(traces.num_steps)
        self._steps = torch.cat([there, there[1:-1].flip(0)]).to(device)
        self._turns_B1 = (5 * torch.arange(batch_size).unsqueeze(1)).to(device)
        self._layer = -1
        self._chooses_tokens = False
        self._slots: torch.Tensor | None = None

    def operators(self, operators: Operators) -> Operators:
        """`operators` whose choices are the recorded ones; layers run in their order, each once a step."""

        def score_chunks(*args: Any) -> None:
            operators.score_chunks(*args)
            self._layer = (self._layer + 1) % self._num_layers
            self._chooses_tokens = False
            if self._layer == 0:
                self._turns_B1.add_(1).remainder_(len(self._steps))

        def top_chunks(scores: torch.Tensor, counts: torch.Tensor, chosen: torch.Tensor) -> None:
            operators.top_chunks(scores, counts, chosen)
            chosen.fill_(-1)
            if self._chooses_tokens:
                chosen[:, :, : self.num_tokens] = self._token_places()
            else:
                chosen[:, :, : self.num_candidates] = self._of_this_step(self._chunks_RSM)

        def plan_chunks(chosen: torch.Tensor, *rest: Any) -> None:
            operators.plan_chunks(chosen, *rest)
            self._slots, self._chooses_tokens = rest[4], True

        return replace(operators, score_chunks=score_chunks, top_chunks=top_chunks, plan_chunks=plan_chunks)

    def _of_this_step(self, recorded_RSx: torch.Tensor) -> torch.Tensor:
        """[B, H, x]: each sequence is at another step of the recording."""
        rows_1H = self._rows_L1H[self._layer]
        return recorded_RSx[rows_1H, self._steps[self._turns_B1]]

    def _token_places(self) -> torch.Tensor:
        """int32 [B, H, T]: slot x chunk size + token of the chunk."""
        assert self._slots is not None
        slots = self._slots.gather(2, self._of_this_step(self._places_RST))
        return slots * self._chunk_size + self._of_this_step(self._offsets_RST)
