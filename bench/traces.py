"""`python -m bench.traces record`: which chunks and tokens a real model selects, step after step, in a small file.

Random weights choose at random at every step; what a real model chose in the last step it mostly chooses again, and
what stays resident need not be fetched. The file holds the choices of SmolLM2-135M-Instruct, by ShadowKV's operators at
the default share of the context, while it continues real prose; `bench.replay` plays them in larger contexts.

Legend: L layers, H KV heads, R = L x H rows, S steps, m candidate chunks, t selected tokens, c chunk size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longshadow.engine.ops import Operators
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.ops.backend import REFERENCE
from longshadow.engine.shadowkv.config import DEFAULT_BUDGET_FRACTION, ShadowKVConfig

FILE = Path(__file__).with_name("traces.npz")
PROMPT_TOKENS = 4000
STEPS = 32
# Among SmolLM2's thirty: attention is local in early layers and far-reaching in later ones.
LAYERS = (2, 8, 14, 19, 24, 28)


@dataclass(frozen=True, eq=False, kw_only=True)
class Traces:
    """What each head chose at each step.

    Attributes:
        candidates: [R, S, m], chunk numbers, ascending.
        tokens: [R, S, t], place of a candidate in its row x chunk size + token of the chunk, ascending.
        num_chunks: chunks of the context, some of which no head ever chose.
        chunk_size: tokens of a chunk.
    """

    candidates: torch.Tensor
    tokens: torch.Tensor
    num_chunks: int
    chunk_size: int

    @property
    def num_rows(self) -> int:
        """Layers x heads."""
        return int(self.candidates.shape[0])

    @property
    def num_steps(self) -> int:
        """Steps."""
        return int(self.candidates.shape[1])

    @property
    def num_candidates(self) -> int:
        """Candidate chunks of a step."""
        return int(self.candidates.shape[2])

    @property
    def num_tokens(self) -> int:
        """Selected tokens of a step."""
        return int(self.tokens.shape[2])

    def overlap(self) -> float:
        """Of the candidates of a step, how many were candidates of the step before, mean over rows and steps."""
        now, before = self.candidates[:, 1:], self.candidates[:, :-1]
        return float((now.unsqueeze(3) == before.unsqueeze(2)).any(3).float().mean())

    def save(self, path: Path) -> None:
        """Writes them, compressed."""
        np.savez_compressed(
            path,
            candidates=self.candidates.numpy().astype(np.uint16),
            tokens=self.tokens.numpy().astype(np.uint16),
            sizes=np.array([self.num_chunks, self.chunk_size]),
        )

    @staticmethod
    def load(path: Path = FILE) -> Traces:
        """Reads what `save` wrote."""
        with np.load(path) as stored:
            num_chunks, chunk_size = stored["sizes"].tolist()
            candidates, tokens = (torch.from_numpy(stored[name].astype(np.int64)) for name in ("candidates", "tokens"))
        return Traces(candidates=candidates, tokens=tokens, num_chunks=num_chunks, chunk_size=chunk_size)


class Recorder:
    """Notes what one sequence's steps choose in some layers, through the operators that they call."""

    def __init__(self, num_layers: int, layers: Sequence[int], chunk_size: int) -> None:
        self._num_layers, self._layers, self._chunk_size = num_layers, layers, chunk_size
        self._num_scored = 0
        self._has_slots = False
        self._chosen = self._slots = torch.empty(0)
        self.candidates: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []

    def recording(self, operators: Operators) -> Operators:
        """`operators`, each of whose results is looked at."""

        def score_chunks(*args: Any) -> None:
            operators.score_chunks(*args)
            self._num_scored += 1
            self._has_slots = False

        def plan_chunks(chosen: torch.Tensor, *rest: Any) -> None:
            operators.plan_chunks(chosen, *rest)
            self._chosen, self._slots, self._has_slots = chosen[0].clone(), rest[4][0].clone(), True

        def top_chunks(scores: torch.Tensor, counts: torch.Tensor, chosen: torch.Tensor) -> None:
            operators.top_chunks(scores, counts, chosen)
            if self._has_slots and (self._num_scored - 1) % self._num_layers in self._layers:
                self._note(chosen[0])

        return replace(operators, score_chunks=score_chunks, plan_chunks=plan_chunks, top_chunks=top_chunks)

    def _note(self, places_HT: torch.Tensor) -> None:
        present = self._chosen[0] >= 0
        candidates, slots = self._chosen[:, present].long(), self._slots[:, present].long()
        places = places_HT[:, places_HT[0] >= 0].long()
        at = (places // self._chunk_size).unsqueeze(2) == slots.unsqueeze(1)
        assert bool(at.any(2).all())
        self.candidates.append(candidates)
        self.tokens.append((at.int().argmax(2) * self._chunk_size + places % self._chunk_size).sort(1).values)

    def traces(self, num_chunks: int) -> Traces:
        """Everything noted, as rows."""
        candidates, tokens = (
            # The layers of a step come one after the other: [S, L, H, x] -> [L H, S, x].
            torch.stack(noted).unflatten(0, (-1, len(self._layers))).permute(1, 2, 0, 3).flatten(0, 1)
            for noted in (self.candidates, self.tokens)
        )
        return Traces(candidates=candidates, tokens=tokens, num_chunks=num_chunks, chunk_size=self._chunk_size)


def record(model: Any, tokens: Sequence[int], *, steps: int, layers: Sequence[int], budget_fraction: float) -> Traces:
    """Reads a prompt, then decodes the most likely token `steps` times and notes what each step chooses."""
    from longshadow import ShadowKVCache
    from longshadow.engine.shadowkv.decode_batch import DecodeBatch

    config = ShadowKVConfig(budget_fraction=budget_fraction, dense_threshold=0, resident_factor=1.0)
    recorder = Recorder(model.config.num_hidden_layers, layers, config.chunk_size)
    with ShadowKVCache.for_model(model, config) as cache, torch.no_grad():
        operators = recorder.recording(choose_operators(model.device, REFERENCE))
        cache.state.batch = DecodeBatch(operators, config, model.device)
        ids = torch.tensor([list(tokens)], device=model.device)
        for _ in range(1 + steps):
            ids = model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    return recorder.traces((len(tokens) - config.local_tokens) // config.chunk_size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Records the file anew."""
    parser = argparse.ArgumentParser(description="Choices of a real model, for the benchmarks of decoding.")
    parser.add_argument("command", choices=("record",))
    parser.parse_args(arguments)
    from bench.prose import language_reference, passages
    from longshadow.models import load_model

    loaded = load_model("demo", dtype=torch.float32, device="cpu")
    [tokens] = passages(loaded.tokenizer(language_reference())["input_ids"], count=1, length=PROMPT_TOKENS)
    traces = record(loaded.model, tokens, steps=STEPS, layers=LAYERS, budget_fraction=DEFAULT_BUDGET_FRACTION)
    traces.save(FILE)
    print(
        f"{FILE}: {traces.num_rows} rows of {traces.num_steps} steps, {traces.num_candidates} candidates and "
        f"{traces.num_tokens} tokens each of {traces.num_chunks} chunks; {traces.overlap():.0%} stay from step to "
        f"step; {FILE.stat().st_size:,} bytes",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
