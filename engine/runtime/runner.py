"""Runs a model over chunks of prompts and over batches of decoding sequences."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from longshadow.engine.runtime.batch import BatchCache, BatchLayer, Chunk, Work
from longshadow.engine.runtime.batch_room import Room
from longshadow.engine.runtime.batched_steps import BatchedSteps
from longshadow.engine.runtime.probing import attention_modules, layer_shapes
from longshadow.engine.runtime.shapes import LayerShape
from longshadow.engine.runtime.state import BlockedEnergy, LayerSequence, SequenceState
from longshadow.engine.runtime.windows import WindowSequence
from longshadow.engine.shadowkv import ShadowKVConfig
from longshadow.engine.shadowkv import sequence as shadowkv
from longshadow.engine.shadowkv.attention import activate
from longshadow.engine.shadowkv.choice import choose_operators, decode_batch
from longshadow.engine.shadowkv.decode import StepCounts
from longshadow.engine.shadowkv.families import (
    AttentionLayer,
    describe_attention,
)
from longshadow.engine.shadowkv.query_weights import QueryEnergy
from longshadow.engine.shadowkv.rope import Rotation
from longshadow.engine.shadowkv.sequence import RotationTable
from longshadow.engine.shadowkv.step_buffers import Geometry
from longshadow.linears import run_on_onednn


class ModelRunner:
    """Runs a model under longshadow's attention, over a cache of its own; belongs to one thread at a time."""

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
        self._cache = self._make_cache()
        self._operators = choose_operators(model, config)
        self._batched = self._make_batched_steps()
        self._release = weakref.finalize(self, _give_back, activate(model), run_on_onednn(model))

    def close(self) -> None:
        """Gives the model its own attention and linear layers back, frees what decoding holds. Repeatable."""
        if self._batched is not None:
            self._batched.close()
        self._release()

    def _make_cache(self) -> BatchCache:
        modules = attention_modules(self.model)
        numbers = itertools.count()
        layers = [
            BatchLayer(
                index,
                modules[index],
                self._work,
                rotations,
                place_in_batch=next(numbers) if shape.window is None else None,
                parks_on_host=self.config.value_store == "host",
            )
            for index, (rotations, shape) in enumerate(zip(self.rotations, self.shapes, strict=True))
        ]
        return BatchCache(layers, self._work)

    def _make_batched_steps(self) -> BatchedSteps | None:
        batch = decode_batch(self.model, self.config, self._operators)
        if batch is None:
            return None
        geometries = {
            index: Geometry(
                num_kv_heads=shape.num_kv_heads,
                key_dim=shape.key_dim,
                value_dim=shape.value_dim,
                chunk_size=self.config.chunk_size,
                layout=self.layouts[index],
                dtype=self.model.dtype,
                device=self.device,
            )
            for index, shape in enumerate(self.shapes)
            if shape.window is None
        }
        return BatchedSteps(self.model, self.config, batch, self._cache, geometries, self.rotations, self.counts)

    @property
    def batched(self) -> BatchedSteps | None:
        """What decodes sequences together; None where each decodes by itself."""
        return self._batched

    def room_bytes(self, room: Room) -> int:
        """Exactly what a decoding batch of this size takes on the device."""
        return 0 if self._batched is None else self._batched.room_bytes(room)

    def hold(self, room: Room) -> None:
        """Gives the decoding batch another size; on return it holds nothing that exceeds it."""
        if self._batched is not None:
            self._batched.hold(room)

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
            operators=self._operators,
        )

    def read(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Caches chunks of prompts; logits of the token after each finished one, [finished, vocabulary]."""
        tokens = [token for chunk in chunks for token in chunk.tokens]
        positions: list[int] = []
        ends: list[int] = []
        for chunk in chunks:
            positions += range(chunk.state.num_tokens, chunk.state.num_tokens + len(chunk.tokens))
            ends += [len(positions) - 1] if chunk.is_last else []
        with self._work.read(chunks):
            logits = self._forward([tokens], [positions], torch.tensor(ends, dtype=torch.long, device=self.device))
        for chunk in chunks:
            chunk.state.num_tokens += len(chunk.tokens)
        return logits[0]

    def decode(self, states: Sequence[SequenceState], tokens: Sequence[int]) -> torch.Tensor:
        """Caches the newest token of each sequence; logits of the next, [sequences, vocabulary]."""
        logits = None if self._batched is None else self._batched.step(states, tokens)
        if logits is None:
            with self._work.decode(states):
                ids, positions = [[token] for token in tokens], [[state.num_tokens] for state in states]
                logits = self._forward(ids, positions, 1)[:, -1]
        for state in states:
            state.num_tokens += 1
        return logits

    def probe(self) -> None:
        """Reads a token and decodes another, of a sequence of their own. Raises where the model runs no more."""
        state = self.new_state(2, blocked_energy=False)
        self.read([Chunk(state=state, tokens=[0], is_last=True, num_prompt=1)])
        if self._batched is None:  # whose memory is for admitted sequences only
            self.decode([state], [0])

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


def _give_back(deactivate: Callable[[], None], undo_linears: Callable[[], None]) -> None:
    deactivate()
    undo_linears()
