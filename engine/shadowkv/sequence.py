"""One sequence in one layer: immutable segments, then a private tail of exact recent tokens.

Legend: Hq query heads, H KV heads, G = Hq / H, T tokens of a prompt, D head_dim.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

import torch

from longshadow.engine.ops import Operators
from longshadow.engine.shadowkv.config import MINIMUM_SEGMENT_TOKENS, ShadowKVConfig
from longshadow.engine.shadowkv.decode import StepCounts, attend_sparsely
from longshadow.engine.shadowkv.exact import AttentionParameters, OnlineSoftmax, attend_causal, attend_streamed
from longshadow.engine.shadowkv.query_weights import QueryEnergy
from longshadow.engine.shadowkv.resident import ResidentChunks
from longshadow.engine.shadowkv.rope import RotaryLayout, Rotation
from longshadow.engine.shadowkv.segment import Segment, compress
from longshadow.engine.shadowkv.storage import ExactTokens

HISTORY_BLOCK_TOKENS = 4096
# Tokens for which a tail is enlarged at least: with it, tables on the device change.
TAIL_ROOM = 256
RotationTable = Callable[[int, int], Rotation | None]


@dataclass(eq=False, kw_only=True)
class Sequence:
    """The cached tokens of one sequence in one layer.

    Attributes:
        segment_tokens: generated tokens that are compressed together.
        layout: rotary layout of the layer, None without RoPE.
        segments: compressed tokens, oldest first; shared between sequences, never changed.
        tail: exact tokens after the last segment.
        parked: exact tokens of a prompt whose last chunk has not come yet, in the value store.
        device: where parked tokens are computed with.
        query_energy: of the prompts' queries so far.
        operators: what reads keys that are compressed; None: PyTorch.
    """

    config: ShadowKVConfig
    layout: RotaryLayout | None
    segment_tokens: int
    segments: list[Segment] = field(default_factory=list)
    tail: ExactTokens = field(default_factory=ExactTokens)
    parked: ExactTokens | None = None
    device: torch.device | None = None
    query_energy: QueryEnergy = field(default_factory=QueryEnergy)
    resident: ResidentChunks = field(default_factory=ResidentChunks)
    counts: StepCounts = field(default_factory=StepCounts)
    operators: Operators | None = None

    @property
    def num_compressed(self) -> int:
        """Tokens in segments."""
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def num_tokens(self) -> int:
        """All cached tokens."""
        return self.num_compressed + self.num_exact_recent

    def attend_prompt(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        parameters: AttentionParameters,
        *,
        begun: OnlineSoftmax | None = None,
    ) -> torch.Tensor:
        """Exact attention of a prompt's tokens over the whole history and causally over themselves.

        query [Hq, T, D], keys and values [H, T, D], not cached yet; `begun` has seen the segments. Returns [Hq, T, D].
        """
        if self.config.query_weighted:
            self.query_energy.add(query, keys.shape[0])
        if self.num_tokens == 0:
            return attend_causal(query, keys, values, parameters)
        history = self._exact_history() if begun else itertools.chain(self.compressed_history(), self._exact_history())
        return attend_streamed(query, history, (keys, values), parameters, begun=begun)

    def compressed_history(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The segments' keys and values, in blocks [H, n, D], on the compute device."""
        block = max(1, HISTORY_BLOCK_TOKENS // self.config.chunk_size)
        for segment in self.segments:
            for start in range(0, segment.num_chunks, block):
                yield segment.span(start, min(start + block, segment.num_chunks))

    def _exact_history(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Cached keys and values after the segments, likewise."""
        if self.tail.num_tokens:
            yield self.tail.keys, self.tail.values
        if self.parked is not None:
            for start in range(0, self.parked.num_tokens, HISTORY_BLOCK_TOKENS):
                tokens = slice(start, start + HISTORY_BLOCK_TOKENS)
                yield (
                    self.parked.keys[:, tokens].to(self.device),
                    self.parked.values[:, tokens].to(self.device),
                )

    def park(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keeps a chunk of an unfinished prompt exactly, in the value store."""
        if self.parked is None:
            self.device = keys.device
            self.parked = ExactTokens(device=torch.device("cpu") if self.config.value_store == "host" else None)
        self.parked.append(keys, values)

    def finish_prompt(self, keys: torch.Tensor, values: torch.Tensor, rotations: RotationTable) -> None:
        """Caches the last tokens of a prompt (maybe none) and compresses what has become old."""
        pieces = [(self.tail.keys, self.tail.values)] if self.tail.num_tokens else []
        num_prompt = keys.shape[1]
        if self.parked is not None:
            num_prompt += self.parked.num_tokens
            pieces.append((self.parked.keys.to(self.device), self.parked.values.to(self.device)))
            self.parked = None
        pieces.append((keys, values))
        if len(pieces) > 1:
            keys = torch.cat([piece[0] for piece in pieces], 1)
            values = torch.cat([piece[1] for piece in pieces], 1)
        self.tail = ExactTokens()
        num_old = self._num_compressible(keys.shape[1], long_prompt=num_prompt >= MINIMUM_SEGMENT_TOKENS)
        if num_old:
            self._compress(keys[:, :num_old], values[:, :num_old], rotations)
        self.tail.append(keys[:, num_old:], values[:, num_old:])

    def append(self, keys: torch.Tensor, values: torch.Tensor, rotations: RotationTable) -> None:
        """Caches generated tokens [H, n, D]; compresses the older part of a tail that has become long."""
        self.tail.append(keys, values)
        num_old = self._num_compressible(self.tail.num_tokens, long_prompt=False)
        if num_old:
            self._compress(*self.tail.take_front(num_old), rotations)

    def make_room(self, rotations: RotationTable) -> None:
        """Compresses what one more generated token makes old, and makes room for that token in the tail.

        Whoever writes its key and value there counts it, too: `tail.num_tokens`.
        """
        num_old = self._num_compressible(self.tail.num_tokens + 1, long_prompt=False)
        if num_old:
            self._compress(*self.tail.take_front(num_old), rotations)
        if not self.tail.has_room:
            self.tail.make_room(TAIL_ROOM)

    def _num_compressible(self, num_recent: int, *, long_prompt: bool) -> int:
        """How many tokens after the last segment should become one now: 0 or a multiple of the chunk."""
        if self.config.runs_dense(self.num_compressed + num_recent):
            return 0
        old = num_recent - self.config.local_tokens
        old -= old % self.config.chunk_size
        if not self.segments or long_prompt:
            return max(0, old)
        return self.segment_tokens if old >= self.segment_tokens else 0

    def _compress(self, keys: torch.Tensor, values: torch.Tensor, rotations: RotationTable) -> None:
        config, start, num_tokens = self.config, self.num_compressed, keys.shape[1]
        width = keys.shape[0] * keys.shape[2]
        num_outliers = config.num_outlier_chunks
        rank = None if config.rank_energy is not None else config.prompt_rank(width)
        if self.segments:
            num_outliers = round(num_outliers * num_tokens / self.segments[0].num_tokens)
            if rank is not None and num_tokens == self.segment_tokens:
                rank = config.generated_rank(width, num_tokens)
        self.segments = [
            *self.segments,
            compress(
                keys,
                values,
                rotations(start, start + num_tokens) if config.key_store == "low_rank" else None,
                self.layout,
                config,
                rank=rank,
                key_weights=self.query_energy.key_weights(self.layout),
                num_sink_chunks=0 if self.segments else config.num_sink_chunks,
                num_outlier_chunks=min(num_outliers, num_tokens // config.chunk_size),
                operators=self.operators,
            ),
        ]

    @property
    def num_exact_recent(self) -> int:
        """Tokens after the last segment, which can be taken back."""
        return self.tail.num_tokens + (self.parked.num_tokens if self.parked else 0)

    def drop_last(self, num_tokens: int) -> None:
        """Forgets the newest tokens, none of which is in a segment."""
        if self.parked is not None:
            num_parked = min(num_tokens, self.parked.num_tokens)
            self.parked.drop_last(num_parked)
            num_tokens -= num_parked
            if not self.parked.num_tokens:
                self.parked = None
        self.tail.drop_last(num_tokens)

    def attend_token(self, query: torch.Tensor, parameters: AttentionParameters) -> torch.Tensor:
        """Sparse attention of the newest cached token, query [Hq, D], over its history: [Hq, D]."""
        grouped = query.view(self.tail.keys.shape[0], -1, query.shape[1])
        out = attend_sparsely(grouped, self.segments, self.tail, self.resident, self.config, parameters, self.counts)
        return out.flatten(0, 1)

    def copy(self) -> "Sequence":
        """A sequence that goes on independently and shares the segments."""
        return Sequence(
            config=self.config,
            layout=self.layout,
            segment_tokens=self.segment_tokens,
            segments=list(self.segments),
            tail=self.tail.copy(),
            parked=None if self.parked is None else self.parked.copy(),
            device=self.device,
            query_energy=self.query_energy.copy(),
            resident=self.resident.copy(),
            counts=self.counts,
            operators=self.operators,
        )

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What is held in memory, by part."""
        parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        for segment in self.segments:
            for part, tensors in segment.tensors().items():
                parts[part] += tensors
        parts["tail"] += self.tail.tensors
        parts["parked"] += self.parked.tensors if self.parked is not None else []
        parts["resident"] += self.resident.tensors
        parts["query energy"] += self.query_energy.tensors
        return parts


def rows_by_segments(sequences: Sequence_[Sequence]) -> list[list[int]]:
    """The numbers of those that share all their segments, group by group."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, sequence in enumerate(sequences):
        groups.setdefault(tuple(map(id, sequence.segments)), []).append(row)
    return list(groups.values())
