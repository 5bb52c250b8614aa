"""A sequence in one layer as it grows, in counts and bytes: `Sequence` without tensors."""

from dataclasses import dataclass, field

import torch

from longshadow.engine.runtime.memory import Bytes
from longshadow.engine.runtime.segment_sizes import FP32_BYTES, INDEX_BYTES, SegmentSizes
from longshadow.engine.runtime.shapes import LayerShape, Start
from longshadow.engine.shadowkv.config import MINIMUM_SEGMENT_TOKENS
from longshadow.engine.shadowkv.selection import StepSizes, step_sizes
from longshadow.engine.shadowkv.sequence import TAIL_ROOM
from longshadow.engine.shadowkv.step_buffers import Capacity
from longshadow.engine.shadowkv.storage import MINIMUM_GROWTH

MOST_TOKENS = 2**24


@dataclass(kw_only=True)
class LayerPlan:
    """A sequence in a full-attention layer.

    Attributes:
        is_batched: it decodes in a batch, which holds its resident chunks.
        first: tokens of the first segment, 0 while there is none.
        num_segments, num_compressed, num_exact_chunks: of all segments, shared ones included.
        capacity: tokens the tail's buffer has room for.
        segment_bytes: of its own segments, not of those it shares.
        largest: the most that was held since the prompt's end.
    """

    layer: LayerShape
    sizes: SegmentSizes
    device: torch.device
    is_batched: bool = False
    first: int = 0
    num_segments: int = 0
    num_compressed: int = 0
    num_exact_chunks: int = 0
    tail: int = 0
    capacity: int = 0
    segment_bytes: Bytes = field(default_factory=Bytes)
    largest: Bytes = field(default_factory=Bytes)

    @property
    def held(self) -> Bytes:
        """Everything now: own segments, the tail's buffer, resident chunks and query energy."""
        device = self.capacity * self.layer.token_bytes + self.resident_bytes
        if self.sizes.config.query_weighted:
            device += self.layer.key_width * FP32_BYTES
        return self.segment_bytes + Bytes(device=device)

    @property
    def step(self) -> StepSizes:
        """Of a step whose token is the newest; no later step of the sequence is smaller."""
        num_available = self._num_chunks - self.num_exact_chunks
        return step_sizes(self.sizes.config, self.num_compressed + self.tail, num_available, self.device)

    @property
    def _num_chunks(self) -> int:
        return self.num_compressed // self.sizes.config.chunk_size

    @property
    def room(self) -> Capacity:
        """What a batch must have room for, to decode it up to here."""
        step = self.step
        return Capacity(
            num_segments=self.num_segments,
            num_chunks=self._num_chunks,
            num_candidates=step.num_candidates,
            num_selected=step.num_selected,
            num_slots=max(step.num_slots, step.num_candidates),
        )

    @property
    def resident_bytes(self) -> int:
        """`ResidentChunks` after a step at this length; its slots only grow with the context."""
        layer, chunk_size, step = self.layer, self.sizes.config.chunk_size, self.step
        if self.is_batched or not step.num_slots:
            return 0
        per_slot = 2 * INDEX_BYTES + chunk_size * (layer.key_dim + layer.value_dim) * layer.itemsize
        per_slot += chunk_size  # which values are there
        chosen = step.num_candidates * INDEX_BYTES if step.num_slots != step.num_candidates else 0
        return layer.num_kv_heads * (max(step.num_slots, step.num_candidates) * per_slot + chosen)

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
        """So many steps: `Sequence.append`, or `Sequence.make_room` and a token, one by one."""
        while num_new > 0:
            if self.is_batched:
                self._make_room()
                # What the last token makes old is compressed before that token comes.
                count = min(num_new, self.capacity - self.tail, max(1, self._until_compression() - 1))
            else:
                count = min(num_new, max(1, self.capacity - self.tail), self._until_compression())
            self.append(count)
            num_new -= count
            if not self.is_batched:
                self._compress(self.tail)

    def _make_room(self) -> None:
        self._compress(self.tail + 1)
        if self.tail == self.capacity:
            self.capacity += TAIL_ROOM + max(MINIMUM_GROWTH, self.tail // 4)

    def _compress(self, num_recent: int) -> None:
        """Of `num_recent` tokens after the last segment those that have become old; the rest gets a new buffer."""
        old = self._num_compressible(num_recent, long_prompt=False)
        if old:
            self._add_segment(old)
            rest, self.tail, self.capacity = self.tail - old, 0, 0
            self.append(rest)

    def _until_compression(self) -> int:
        """Tokens until the tail may be compressed, at least 1; never more than until it is."""
        config = self.sizes.config
        if self.first:
            return max(1, self.sizes.segment_tokens + config.local_tokens - self.tail)
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
        config = self.sizes.config
        if config.runs_dense(self.num_compressed + recent):
            return 0
        old = recent - config.local_tokens
        old -= old % config.chunk_size
        if not self.first or long_prompt:
            return max(0, old)
        return self.sizes.segment_tokens if old >= self.sizes.segment_tokens else 0

    def _add_segment(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        self.segment_bytes += self.sizes.segment(self.layer, num_tokens, self.first)
        self.num_exact_chunks += self.sizes.num_exact_chunks(num_tokens, self.first)
        self.num_segments += 1
        self.num_compressed += num_tokens
        self.first = self.first or num_tokens


@dataclass(kw_only=True)
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
