"""The exact bytes a sequence takes in every layer, before it exists: what `memory()` reports when it does.

Legend: H KV heads, D head_dim of keys, W = H x D, c chunk size, r rank.
"""

from collections import Counter
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

import torch

from longshadow.engine.runtime.memory import Bytes
from longshadow.engine.shadowkv.config import MINIMUM_SEGMENT_TOKENS, ShadowKVConfig
from longshadow.engine.shadowkv.segment import FACTORISATION_BLOCK
from longshadow.engine.shadowkv.storage import MINIMUM_GROWTH

INDEX_BYTES = 8
SCALE_BYTES = 4
ENERGY_BYTES = 4
MOST_TOKENS = 2**24


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What one attention layer caches of a token.

    Attributes:
        itemsize: bytes of an element of keys and values.
        window: tokens a sliding layer sees; None for full attention, which is compressed.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    window: int | None = None

    @property
    def key_width(self) -> int:
        """Elements of a token's keys."""
        return self.num_kv_heads * self.key_dim

    @property
    def token_bytes(self) -> int:
        """Exact keys and values of a token."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.itemsize

    def exact_bytes(self, num_tokens: int) -> int:
        """What a stock cache holds of so many tokens."""
        return self.token_bytes * (num_tokens if self.window is None else min(num_tokens, self.window))


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a sequence goes on from: the tokens of each shared segment, and of its own copy of the tail."""

    segments: tuple[int, ...] = ()
    tail: int = 0

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return sum(self.segments) + self.tail


@dataclass(frozen=True, kw_only=True)
class Need:
    """The most a request holds.

    Attributes:
        prefill: until its prompt has been read, workspace included; never less than afterwards.
        shared: afterwards, what its completions share.
        completion: afterwards, what each completion has of its own.
    """

    prefill: Bytes
    shared: Bytes
    completion: Bytes


class Accounting:
    """Bytes of sequences of one model under one configuration."""

    def __init__(self, layers: Sequence_[LayerShape], config: ShadowKVConfig, device: torch.device) -> None:
        self.layers = layers
        self.config = config
        self.device = device
        self._kinds = Counter(layers)
        full = [layer for layer in layers if layer.window is None]
        self.segment_tokens = config.generated_segment_tokens(max(layer.key_width for layer in full))

    def need(self, num_prompt: int, num_new: int, *, start: Start | None = None, num_completions: int = 1) -> Need:
        """Of a request that reads `num_prompt` tokens after `start` and then caches up to `num_new` tokens."""
        start = start or Start()
        total_tokens = start.num_tokens + num_prompt + num_new
        prefill, shared, completion = self.workspace(num_prompt + start.tail), Bytes(), Bytes()
        for layer, count in self._kinds.items():
            plan = plan_of(layer, self, start, total_tokens)
            before = plan.held
            plan.finish_prompt(num_prompt)
            # While one layer is compressed, earlier ones have been, and parked tokens may be kept for other prompts.
            prefill += (self._parked(layer, num_prompt) + before.at_least(plan.held)) * count
            prompt = plan.segment_bytes
            plan.generate(num_new)
            shared += prompt * count
            completion += (plan.largest - prompt) * count
        afterwards = shared + completion * num_completions
        return Need(prefill=prefill.at_least(afterwards), shared=shared, completion=completion)

    def document(self, start: Start) -> Bytes:
        """Of a document that consists of these segments and this tail."""
        total = Bytes()
        for layer, count in self._kinds.items():
            plan = plan_of(layer, self, Start(), start.num_tokens)
            plan.restore(start, shared=False)
            total += plan.held * count
        return total

    @property
    def token_bytes(self) -> int:
        """Exact keys and values of a token in all layers."""
        return sum(layer.token_bytes for layer in self.layers)

    @property
    def energy_bytes(self) -> int:
        """Query energy of all layers."""
        if not self.config.query_weighted:
            return 0
        return sum(layer.key_width * ENERGY_BYTES for layer in self.layers if layer.window is None)

    def _parked(self, layer: LayerShape, num_tokens: int) -> Bytes:
        return self.stored(num_tokens * layer.token_bytes)

    def stored(self, num_bytes: int) -> Bytes:
        """Bytes in the value store."""
        return Bytes(host=num_bytes) if self.config.value_store == "host" else Bytes(device=num_bytes)

    def num_exact_chunks(self, num_tokens: int, first: int) -> int:
        """Sink and outlier chunks per head of a segment; `first`: tokens of the first one, 0 if this is it."""
        config = self.config
        num_sink, num_outlier = config.num_sink_chunks, config.num_outlier_chunks
        if first:
            num_sink, num_outlier = 0, round(num_outlier * num_tokens / first)
        num_chunks = num_tokens // config.chunk_size
        num_sink = min(num_sink, num_chunks)
        return num_sink + min(num_outlier, num_chunks - num_sink)

    def rank(self, layer: LayerShape, num_tokens: int, first: int) -> int:
        """Of such a segment; the largest possible where the keys' energy decides."""
        if self.config.rank_energy is not None:
            return layer.key_width
        if first and num_tokens == self.segment_tokens:
            return min(layer.key_width, self.config.generated_rank(layer.key_width, num_tokens))
        return min(layer.key_width, self.config.prompt_rank(layer.key_width))

    def workspace(self, num_tokens: int) -> Bytes:
        """An upper bound on what compressing so many tokens of one layer needs beside what it leaves."""
        most = 0
        for layer in self.layers:
            if layer.window is not None:
                continue
            width = layer.key_width
            rank = width if self.config.rank_energy is not None else self.config.prompt_rank(width)
            # Exact tokens, joined and brought to the device; keys, then coefficients, in fp32 or better.
            per_token = 2 * layer.token_bytes + 2 * width * max(4, layer.itemsize) + 4 * rank * max(4, layer.itemsize)
            gram = 5 * width * width * 8 + 4 * FACTORISATION_BLOCK * width * max(4, layer.itemsize)
            most = max(most, num_tokens * per_token + gram)
        return Bytes(device=most)


@dataclass
class LayerPlan:
    """A sequence in a full-attention layer as it grows: `Sequence` without tensors.

    Attributes:
        first: tokens of the first segment, 0 while there is none.
        num_compressed, num_exact_chunks: of all segments.
        capacity: tokens the tail's buffer has room for.
        segment_bytes: of its own segments, not of those it shares.
        largest: the most that was held since the prompt's end.
    """

    layer: LayerShape
    accounting: Accounting
    first: int = 0
    num_compressed: int = 0
    num_exact_chunks: int = 0
    tail: int = 0
    capacity: int = 0
    segment_bytes: Bytes = field(default_factory=Bytes)
    largest: Bytes = field(default_factory=Bytes)

    @property
    def held(self) -> Bytes:
        """Everything now: own segments, the tail's buffer, resident chunks and query energy."""
        layer, config = self.layer, self.accounting.config
        device = self.capacity * layer.token_bytes + self._resident_bytes()
        if config.query_weighted:
            device += layer.key_width * ENERGY_BYTES
        return self.segment_bytes + Bytes(device=device)

    def finish_prompt(self, num_prompt: int) -> None:
        """`Sequence.finish_prompt` of a prompt that was parked."""
        recent = self.tail + num_prompt
        old = self._num_compressible(recent, long_prompt=num_prompt >= MINIMUM_SEGMENT_TOKENS)
        self._add_segment(old)
        self.tail, self.capacity, self.largest = 0, 0, Bytes()
        self.append(recent - old)

    def restore(self, start: Start, *, shared: bool) -> None:
        """An empty sequence gets these segments, as its own or `shared`, and this tail."""
        for num_tokens in start.segments:
            self._add_segment(num_tokens)
        if shared:
            self.segment_bytes = Bytes()
        self.append(start.tail)

    def generate(self, num_new: int) -> None:
        """`Sequence.append` of so many tokens, one by one."""
        while num_new > 0:
            room = max(1, self.capacity - self.tail)
            count = min(num_new, room, self._until_compression())
            self.append(count)
            num_new -= count
            old = self._num_compressible(self.tail, long_prompt=False)
            if old:
                self._add_segment(old)
                rest, self.tail, self.capacity = self.tail - old, 0, 0
                self.append(rest)

    def _until_compression(self) -> int:
        """Tokens until the tail may be compressed, at least 1; never more than until it is."""
        config = self.accounting.config
        if self.first:
            return max(1, self.accounting.segment_tokens + config.local_tokens - self.tail)
        if not config.runs_dense(self.tail + 1):
            return max(1, config.local_tokens + config.chunk_size - self.tail)
        count = 1
        while config.runs_dense(self.tail + 2 * count) and count < MOST_TOKENS:
            count *= 2
        return count

    def append(self, count: int) -> None:
        """As `ExactTokens.append`."""
        needed = self.tail + count
        if count and needed > self.capacity:
            self.capacity = needed + max(MINIMUM_GROWTH, self.tail // 4)
        self.tail = needed
        self.largest = self.largest.at_least(self.held)

    def _num_compressible(self, recent: int, *, long_prompt: bool) -> int:
        config = self.accounting.config
        if config.runs_dense(self.num_compressed + recent):
            return 0
        old = recent - config.local_tokens
        old -= old % config.chunk_size
        if not self.first or long_prompt:
            return max(0, old)
        return self.accounting.segment_tokens if old >= self.accounting.segment_tokens else 0

    def _add_segment(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        self.segment_bytes += self._segment_bytes(num_tokens)
        self.num_exact_chunks += self.accounting.num_exact_chunks(num_tokens, self.first)
        self.num_compressed += num_tokens
        self.first = self.first or num_tokens

    def _segment_bytes(self, num_tokens: int) -> Bytes:
        layer, config = self.layer, self.accounting.config
        heads, width, item = layer.num_kv_heads, layer.key_width, layer.itemsize
        num_chunks = num_tokens // config.chunk_size
        exact = self.accounting.num_exact_chunks(num_tokens, self.first)
        device = exact * (heads * INDEX_BYTES + config.chunk_size * layer.token_bytes)
        device += _stored(num_chunks * heads, layer.key_dim, item, packed=config.factor_dtype is not None)
        packed = config.value_dtype is not None
        stored = _stored(num_tokens * heads, layer.value_dim, item, packed=packed)
        if config.key_store == "exact":
            stored += _stored(num_tokens * heads, layer.key_dim, item, packed=packed)
        else:
            rank = self.accounting.rank(layer, num_tokens, self.first)
            device += (
                _stored(num_tokens, rank, item, packed=config.factor_dtype is not None) + (rank + 1) * width * item
            )
        return Bytes(device=device) + self.accounting.stored(stored)

    def _resident_bytes(self) -> int:
        """`ResidentChunks` after a step at this length; its slots only grow with the context."""
        config, layer = self.accounting.config, self.layer
        available = self.num_compressed // config.chunk_size - self.num_exact_chunks
        selected = min(config.num_selected_chunks(self.num_compressed + self.tail), available)
        candidates = min(round(config.candidate_factor * selected), available)
        slots = min(config.num_resident_chunks(candidates, self.accounting.device), available)
        if not slots:
            return 0
        per_slot = 2 * INDEX_BYTES + config.chunk_size * (layer.key_dim + layer.value_dim) * layer.itemsize
        per_slot += config.chunk_size  # which values are there
        chosen = candidates * INDEX_BYTES if slots != candidates else 0
        return layer.num_kv_heads * (max(slots, candidates) * per_slot + chosen)


@dataclass
class WindowPlan:
    """A sequence in a sliding layer: a ring with room for the window, or for all tokens if they are fewer."""

    layer: LayerShape
    capacity: int

    @property
    def held(self) -> Bytes:
        """The ring, made at full size."""
        return Bytes(device=self.capacity * self.layer.token_bytes)

    @property
    def largest(self) -> Bytes:
        """The ring."""
        return self.held

    @property
    def segment_bytes(self) -> Bytes:
        """Nothing is compressed."""
        return Bytes()

    def finish_prompt(self, num_prompt: int) -> None:
        """Nothing changes."""

    def generate(self, num_new: int) -> None:
        """Nothing changes."""

    def restore(self, start: Start, *, shared: bool) -> None:
        """Nothing changes."""


def plan_of(layer: LayerShape, accounting: Accounting, start: Start, total_tokens: int) -> LayerPlan | WindowPlan:
    """A sequence in this layer that goes on from `start` and gets `total_tokens` at most."""
    if layer.window is not None:
        return WindowPlan(layer, min(layer.window, total_tokens))
    plan = LayerPlan(layer, accounting)
    plan.restore(start, shared=True)
    return plan


def _stored(num_groups: int, group_width: int, itemsize: int, *, packed: bool) -> int:
    """A `RowStore` of so many groups: elements, and in one byte each a scale for each group."""
    return num_groups * (group_width + SCALE_BYTES if packed else group_width * itemsize)
