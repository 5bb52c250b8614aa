"""What a sequence consists of after its prompt and some new tokens, and what its next step selects.

The rules of `engine.shadowkv.sequence` and `engine.shadowkv.decode` as numbers: no tensor is made.
"""

from dataclasses import dataclass
from functools import lru_cache

from longshadow.engine.shadowkv.config import MINIMUM_SEGMENT_TOKENS, ShadowKVConfig

# Of `engine.shadowkv.storage`, which needs torch.
MINIMUM_GROWTH = 64


@dataclass(frozen=True, kw_only=True)
class SegmentSize:
    """An immutable compressed piece: its tokens, its rank, and sink and outlier chunks per KV head."""

    num_tokens: int
    rank: int
    num_exact_chunks: int


@dataclass(frozen=True, kw_only=True)
class SequenceSize:
    """One sequence in one layer.

    Attributes:
        num_tokens: prompt and new tokens.
        tail_tokens: exact tokens after the last segment.
        tail_capacity: tokens that the tail's buffer has room for.
        logged_rotations: tokens whose rotation is kept beside the segments'.
        num_selected_chunks, num_candidate_chunks: of a step, per KV head; 0 where nothing is selected.
        num_slots: resident chunks per KV head.
    """

    num_tokens: int
    segments: tuple[SegmentSize, ...]
    tail_tokens: int
    tail_capacity: int
    logged_rotations: int
    chunk_size: int
    num_selected_chunks: int
    num_candidate_chunks: int
    num_slots: int

    @property
    def num_compressed(self) -> int:
        """Tokens in segments."""
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def num_chunks(self) -> int:
        """Chunks of all segments, exact ones included."""
        return self.num_compressed // self.chunk_size

    @property
    def num_exact_tokens(self) -> int:
        """Tokens that every step attends to: sinks, outliers and the tail."""
        return sum(segment.num_exact_chunks for segment in self.segments) * self.chunk_size + self.tail_tokens


def grown_capacity(capacity: int, num_tokens: int, num_more: int) -> int:
    """Room of a buffer with `num_tokens` after `num_more` were appended."""
    needed = num_tokens + num_more
    return capacity if capacity >= needed else needed + max(MINIMUM_GROWTH, num_tokens // 4)


@lru_cache(maxsize=256)
def lay_out(config: ShadowKVConfig, key_width: int, num_prompt_tokens: int, num_new_tokens: int) -> SequenceSize:
    """A sequence that was prompted once and has generated `num_new_tokens`.

    Raises:
        ValueError: the configuration has `rank_energy`, whose ranks depend on the keys, or a rank out of range.
    """
    if config.rank_energy is not None:
        raise ValueError("rank_energy gives ranks that depend on the keys: plan with a fixed rank")
    segments: list[SegmentSize] = []
    logged = num_prompt_tokens
    num_old = _num_compressible(config, segments, num_prompt_tokens, key_width, prompt=num_prompt_tokens)
    if num_old:
        segments.append(_segment(config, segments, num_old, key_width))
    tail = num_prompt_tokens - num_old
    capacity = grown_capacity(0, 0, tail)
    forget = num_old > 0
    for _ in range(num_new_tokens):
        # A segment's rotations are its own; the log drops them when the next token comes.
        logged = tail + 1 if forget else logged + 1
        forget = False
        capacity = grown_capacity(capacity, tail, 1)
        tail += 1
        num_old = _num_compressible(config, segments, tail, key_width, prompt=0)
        if num_old:
            segments.append(_segment(config, segments, num_old, key_width))
            tail -= num_old
            capacity = grown_capacity(0, 0, tail)
            forget = True
    selected, candidates = _selection(config, segments, tail)
    return SequenceSize(
        num_tokens=num_prompt_tokens + num_new_tokens,
        segments=tuple(segments),
        tail_tokens=tail,
        tail_capacity=capacity,
        logged_rotations=logged,
        chunk_size=config.chunk_size,
        num_selected_chunks=selected,
        num_candidate_chunks=candidates,
        num_slots=_num_slots(config, segments, candidates),
    )


def _num_compressible(
    config: ShadowKVConfig, segments: list[SegmentSize], num_recent: int, key_width: int, *, prompt: int
) -> int:
    if config.runs_dense(sum(segment.num_tokens for segment in segments) + num_recent):
        return 0
    old = num_recent - config.local_tokens
    old -= old % config.chunk_size
    if not segments or prompt >= MINIMUM_SEGMENT_TOKENS:
        return max(0, old)
    segment_tokens = config.generated_segment_tokens(key_width)
    return segment_tokens if old >= segment_tokens else 0


def _segment(config: ShadowKVConfig, segments: list[SegmentSize], num_tokens: int, key_width: int) -> SegmentSize:
    num_chunks = num_tokens // config.chunk_size
    if segments:
        num_outliers = round(config.num_outlier_chunks * num_tokens / segments[0].num_tokens)
        rank, num_exact = config.generated_rank(key_width, num_tokens), min(num_outliers, num_chunks)
    else:
        rank, num_exact = (
            config.prompt_rank(key_width),
            min(config.num_sink_chunks + config.num_outlier_chunks, num_chunks),
        )
    return SegmentSize(num_tokens=num_tokens, rank=rank, num_exact_chunks=num_exact)


def _selection(config: ShadowKVConfig, segments: list[SegmentSize], tail: int) -> tuple[int, int]:
    num_tokens = sum(segment.num_tokens for segment in segments) + tail
    available = _num_available(config, segments)
    selected = min(config.num_selected_chunks(num_tokens), available)
    return selected, min(round(config.candidate_factor * selected), available)


def _num_available(config: ShadowKVConfig, segments: list[SegmentSize]) -> int:
    return sum(segment.num_tokens // config.chunk_size - segment.num_exact_chunks for segment in segments)


def _num_slots(config: ShadowKVConfig, segments: list[SegmentSize], num_candidates: int) -> int:
    factor = 1.0 if config.resident_factor is None else config.resident_factor
    slots = min(round(factor * num_candidates), _num_available(config, segments))
    return max(slots, num_candidates) if slots else 0
