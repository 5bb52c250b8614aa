"""Runs a model over chunks of prompts and over batches of decoding sequences."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from longshadow.engine.runtime.batch import BatchCache, BatchLayer, Chunk, Work
from longshadow.engine.runtime.linears import run_on_onednn
from longshadow.engine.runtime.shapes import LayerShape
from longshadow.engine.runtime.state import BlockedEnergy, LayerSequence, SequenceState
from longshadow.engine.runtime.windows import WindowSequence
from longshadow.engine.shadowkv import ShadowKVConfig
from longshadow.engine.shadowkv import sequence as shadowkv
from longshadow.engine.shadowkv.attention import activate, deactivate
from longshadow.engine.shadowkv.decode import StepCounts
from longshadow.engine.shadowkv.families import (
    LENGTH_DEPENDENT_ROPE,
    AttentionLayer,
    describe_attention,
    rope_parameters,
)
from longshadow.engine.shadowkv.query_weights import QueryEnergy
from longshadow.engine.shadowkv.rope import Rotation
from longshadow.engine.shadowkv.sequence import RotationTable
from longshadow.models import max_positions

PROBE_TOKENS = 2


class ModelRunner:
    """A model that runs longshadow's attention until `close`; it belongs to one thread at a time."""

    def __init__(self, model: PreTrainedModel, config: ShadowKVConfig, max_model_len: int) -> None:
        """Raises ValueError for models that ShadowKV does not support."""
        self.model: Any = model
        self.config = config
        self.device = model.device
        self.counts = StepCounts()
        described, self._angles = describe_attention(model)
        attention = [layer for layer in described if layer is not None]
        config.prompt_rank(min(layer.key_width for layer in attention))
        self.shapes = layer_shapes(model)
        self.segment_tokens = config.generated_segment_tokens(max(layer.key_width for layer in attention))
        self._described = described
        self.layouts = [None if layer is None else layer.layout for layer in described]
        self._tables: dict[str, Rotation] = {}
        self.rotations = [self._rotation_table(layer, max_model_len) for layer in described]
        self._work = Work()
        modules = attention_modules(model)
        self._cache = BatchCache(
            [
                BatchLayer(
                    index,
                    modules[index],
                    self._work,
                    rotations,
                    window=shape.window,
                    parks_on_host=config.value_store == "host",
                )
                for index, (rotations, shape) in enumerate(zip(self.rotations, self.shapes, strict=True))
            ],
            self._work,
        )
        activate(model)
        self._release = weakref.finalize(self, _give_back, model, run_on_onednn(model))

    def close(self) -> None:
        """Gives the model its own attention and linear layers back. Repeatable."""
        self._release()

    @property
    def rotation_bytes(self) -> int:
        """Of the rotation tables, which all sequences share."""
        return sum(table.cos.nbytes + table.sin.nbytes for table in self._tables.values())

    def _rotation_table(self, layer: AttentionLayer | None, max_model_len: int) -> RotationTable:
        """cos and sin of every position: segments hold views of it."""
        if layer is None or layer.layout is None or self.config.key_store == "exact":
            return lambda start, stop: None
        if layer.layer_type not in self._tables:
            positions = torch.arange(max_model_len, device=self.device).unsqueeze(0)
            rotation = self._angles.rotation(layer.layer_type, positions, layer.layout)
            self._tables[layer.layer_type] = Rotation(rotation.cos[0].contiguous(), rotation.sin[0].contiguous())
        table = self._tables[layer.layer_type]
        return lambda start, stop: table[slice(start, stop)]

    def new_state(self, max_tokens: int, *, blocked_energy: bool) -> SequenceState:
        """A sequence without tokens that will get `max_tokens` at most."""
        return SequenceState(
            layers=[
                self._new_layer(layer, shape, max_tokens, blocked_energy)
                for layer, shape in zip(self._described, self.shapes, strict=True)
            ]
        )

    def _new_layer(
        self, layer: AttentionLayer | None, shape: LayerShape, max_tokens: int, blocked_energy: bool
    ) -> LayerSequence:
        if layer is None:
            assert shape.window is not None
            return WindowSequence(window=shape.window, capacity=min(shape.window, max_tokens))
        return shadowkv.Sequence(
            config=self.config,
            layout=layer.layout,
            segment_tokens=self.segment_tokens,
            query_energy=BlockedEnergy() if blocked_energy else QueryEnergy(),
            counts=self.counts,
        )

    def read(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Caches chunks of prompts; logits of the token after each finished one, [finished, vocabulary]."""
        tokens = [token for chunk in chunks for token in chunk.tokens]
        positions: list[int] = []
        ends: list[int] = []
        for chunk in chunks:
            positions += range(chunk.state.num_tokens, chunk.state.num_tokens + len(chunk.tokens))
            ends += [len(positions) - 1] if chunk.is_last else []
        with self._doing(chunks=chunks):
            logits = self._forward([tokens], [positions], torch.tensor(ends, dtype=torch.long, device=self.device))
        for chunk in chunks:
            chunk.state.num_tokens += len(chunk.tokens)
        return logits[0]

    def decode(self, states: Sequence[SequenceState], tokens: Sequence[int]) -> torch.Tensor:
        """Caches the newest token of each sequence; logits of the next, [sequences, vocabulary]."""
        size = batch_size(len(states)) if self.device.type == "cuda" else len(states)
        padding = [0] * (size - len(states))
        ids = [[token] for token in [*tokens, *padding]]
        positions = [[position] for position in [*(state.num_tokens for state in states), *padding]]
        with self._doing(decoding=states):
            logits = self._forward(ids, positions, 1)
        for state in states:
            state.num_tokens += 1
        return logits[: len(states), -1]

    @contextmanager
    def _doing(self, *, chunks: Sequence[Chunk] = (), decoding: Sequence[SequenceState] = ()) -> Iterator[None]:
        self._work.chunks, self._work.decoding = chunks, decoding
        try:
            yield
        finally:
            self._work.chunks, self._work.decoding = (), ()

    def _forward(
        self, ids: list[list[int]], positions: list[list[int]], logits_to_keep: int | torch.Tensor
    ) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=torch.tensor(ids, device=self.device),
            position_ids=torch.tensor(positions, device=self.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits
        return logits


def _give_back(model: PreTrainedModel, undo_linears: Callable[[], None]) -> None:
    deactivate(model)
    undo_linears()


def batch_size(num_sequences: int) -> int:
    """The fixed sizes in which a GPU decodes: powers of two up to 8, then multiples of 8."""
    if num_sequences > 8:
        return -(-num_sequences // 8) * 8
    return 1 << (num_sequences - 1).bit_length()


def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """What each layer caches, found out by running two tokens."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    _, arguments = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    shapes = []
    for layer, argument in zip(cache.layers, arguments, strict=True):
        held: Any = layer
        shapes.append(
            LayerShape(
                num_kv_heads=held.keys.shape[1],
                key_dim=held.keys.shape[3],
                value_dim=held.values.shape[3],
                itemsize=held.keys.itemsize,
                window=argument.get("sliding_window"),
            )
        )
    return shapes


def attention_modules(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """The modules that hand keys to each cache layer."""
    return {
        int(module.layer_idx): module  # type: ignore[arg-type]
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling")
    }


def length_limit(model: PreTrainedModel) -> int | None:
    """Positions at which sequences of all lengths can share a batch; None without a limit."""
    text_config = model.config.get_text_config(decoder=True)
    limit = max_positions(model.config)
    for parameters in rope_parameters(model):
        name = LENGTH_DEPENDENT_ROPE.get(parameters.get("rope_type", "default"))
        if name is not None:
            fixed = parameters.get(name) or getattr(text_config, name, None) or text_config.max_position_embeddings
            limit = fixed if limit is None else min(limit, fixed)
    return limit
