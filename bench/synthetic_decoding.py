"""Batches that decode long contexts nobody has read: caches filled at once, choices replayed from a real model.

Legend: L layers, B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache

from bench.baselines.fixed_cache import random_fixed_cache
from bench.cuda_graphs import captured
from bench.replay import Replay
from bench.synthetic import ModelShape
from bench.synthetic_segments import SegmentMaker
from bench.traces import Traces
from longshadow.engine.ops import operators as choose_operators
from longshadow.engine.planning.advice import PLACEMENTS
from longshadow.engine.shadowkv import DecodeGraphs, ShadowKVCache, ShadowKVConfig
from longshadow.engine.shadowkv.config import DEFAULT_BUDGET_FRACTION
from longshadow.engine.shadowkv.decode_batch import DecodeBatch
from longshadow.engine.shadowkv.layer import ShadowKVLayer
from longshadow.engine.shadowkv.segment import Segment

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Setting:
    """What all batches of a benchmark share.

    Attributes:
        host_bytes: of pinned memory; layers take turns with values that would be more.
        backend: of the operators; None is the best.
    """

    shape: ModelShape
    traces: Traces
    dtype: torch.dtype
    device: torch.device
    seed: int
    host_bytes: int
    backend: str | None = None

    def model(self, max_positions: int) -> LlamaForCausalLM:
        """Random weights, made on the device: a CPU takes minutes for eight billion."""
        with self.device:
            return self.shape.model(
                dtype=self.dtype, device=str(self.device), seed=self.seed, max_positions=max_positions
            )

    def config(self, placement: str, context: int) -> ShadowKVConfig:
        """The default budget, rounded up to a multiple of the recorded choices; candidates stay resident."""
        recorded = self.traces.num_tokens
        budget = math.ceil(DEFAULT_BUDGET_FRACTION * context / recorded) * recorded
        return replace(PLACEMENTS[placement], budget_tokens=budget, resident_factor=1.0, dense_threshold=0)

    def replay(self, config: ShadowKVConfig, context: int, batch_size: int) -> Replay:
        """The recorded choices at the budget of `config`, over the context's chunks."""
        return Replay(
            self.traces,
            num_chunks=(context - config.local_tokens) // config.chunk_size,
            num_candidates=round(config.candidate_factor * config.num_selected_chunks(context)),
            num_layers=self.shape.num_layers,
            num_heads=self.shape.num_kv_heads,
            batch_size=batch_size,
            device=self.device,
        )

    def random_cache(self, context: int, batch_size: int) -> Cache:
        """A full cache of `context` tokens; the last one's place is the new token's."""
        return random_fixed_cache(
            num_layers=self.shape.num_layers,
            batch_size=batch_size,
            num_tokens=context,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            dtype=self.dtype,
            device=self.device,
            seed=self.seed,
        )


class SegmentPool:
    """The segments [L][B] of a batch, made when they are asked for; smaller batches take the first of them."""

    def __init__(self, setting: Setting, config: ShadowKVConfig, context: int) -> None:
        """`context` tokens, of which the last `local_tokens` are in no segment."""
        self._setting, self._config = setting, config
        num_compressed = (context - config.local_tokens) // config.chunk_size * config.chunk_size
        self.num_recent = context - num_compressed
        shape, dtype = setting.shape, setting.dtype
        self.maker = SegmentMaker(shape, config, num_compressed, dtype=dtype, device=setting.device, seed=setting.seed)
        element, scale = (1, 4) if config.value_dtype == "int8" else (dtype.itemsize, 0)
        self.value_bytes = num_compressed * shape.num_kv_heads * (shape.head_dim * element + scale)
        self._exact_chunks = setting.replay(config, context, 1).free_chunks[: self.maker.num_exact_chunks]
        self._segments: list[list[Segment]] = []

    def take(self, batch_size: int) -> list[list[Segment]]:
        """Segments of a batch."""
        if not self._segments or len(self._segments[0]) < batch_size:
            self._segments = []
            self._segments = self._make(batch_size)
        return [layer[:batch_size] for layer in self._segments]

    def drop(self) -> None:
        """Frees them."""
        self._segments = []

    def _make(self, batch_size: int) -> list[list[Segment]]:
        num_layers = distinct = self._setting.shape.num_layers
        if self._config.value_store == "host":
            distinct = min(num_layers, max(1, self._setting.host_bytes // (batch_size * self.value_bytes)))
        rotations = [self.maker.rotation() for _ in range(batch_size)]
        values = [[self.maker.values() for _ in range(batch_size)] for _ in range(distinct)]
        return [
            [
                self.maker.segment(stored, rotation, self._exact_chunks)
                for stored, rotation in zip(values[layer % distinct], rotations, strict=True)
            ]
            for layer in range(num_layers)
        ]


@contextmanager
def filled_cache(
    setting: Setting, model: LlamaForCausalLM, config: ShadowKVConfig, pool: SegmentPool, context: int, batch_size: int
) -> Iterator[ShadowKVCache]:
    """A cache of `context` tokens in each of `batch_size` sequences, whose steps choose what was recorded."""
    replay, segments = setting.replay(config, context, batch_size), pool.take(batch_size)
    with ShadowKVCache.for_model(model, config) as cache:
        operators = replay.operators(choose_operators(setting.device, setting.backend))
        cache.state.batch = DecodeBatch(operators, config, setting.device)
        for layer, row in zip(cache.layers, segments, strict=True):
            assert isinstance(layer, ShadowKVLayer)
            recent = pool.maker.tokens(pool.num_recent)
            everywhere = recent.expand(batch_size, -1, -1, -1)
            layer.lazy_initialization(everywhere, everywhere)
            for sequence, segment in zip(layer.sequences, row, strict=True):
                sequence.segments = [segment]
                sequence.tail.append(recent, recent)
        yield cache


def position_of(token: int, batch_size: int, device: torch.device) -> torch.Tensor:
    """[B, 1]: the position of a token, the same for all sequences."""
    return torch.full((batch_size, 1), token, dtype=torch.long, device=device)


def shadowkv_step(model: LlamaForCausalLM, cache: ShadowKVCache, context: int) -> Step:
    """Decodes the most likely next token of each sequence at each call; returns the logits."""
    graphs = DecodeGraphs(model, cache)
    position = position_of(context, cache.batch_size, model.device)
    ids = torch.zeros_like(position)

    def step() -> torch.Tensor:
        logits = graphs.step(ids, position)
        expect_captured(graphs, model)
        ids.copy_(logits.argmax(-1))
        position.add_(1)
        return logits

    return step


def expect_captured(graphs: DecodeGraphs, model: LlamaForCausalLM) -> None:
    """Raises what kept a GPU from capturing a step, such as OutOfMemoryError: it would be timed as something else."""
    if model.device.type == "cuda" and not graphs.num_graphs:
        raise graphs.failure or RuntimeError("the decoding step was not captured; the warning above says why")


def full_step(setting: Setting, model: LlamaForCausalLM, context: int, batch_size: int, implementation: str) -> Step:
    """The same over a full cache that holds `context` tokens with the new one, which the next one overwrites."""
    cache = setting.random_cache(context, batch_size)
    model.set_attn_implementation(implementation)
    position = position_of(context - 1, batch_size, model.device)
    ids = torch.zeros_like(position)
    logits = torch.empty(batch_size, 1, setting.shape.vocab_size, dtype=model.dtype, device=model.device)

    def forward() -> None:
        logits.copy_(model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True).logits)
        ids.copy_(logits.argmax(-1))

    replay = captured(forward, model.device.type)

    def step() -> torch.Tensor:
        replay()
        return logits

    return step
