"""Bytes, operations and kernels of ShadowKV's operators in one layer: of a decoding step, and of a prompt.

Legend: B sequences, H KV heads, G query heads per KV head, D head_dim, C chunks of c tokens, m candidate chunks,
t selected tokens, r rank, e bytes of an element.
"""

from dataclasses import dataclass

from longshadow.engine.planning.implementation import Implementation
from longshadow.engine.planning.layout import SequenceSize
from longshadow.engine.planning.memory import INDEX_BYTES, SCALE_BYTES, vector_bytes
from longshadow.engine.planning.model_shape import ModelShape
from longshadow.engine.planning.products import LOGIT_BYTES, Work, full_attention
from longshadow.engine.shadowkv.config import ShadowKVConfig

# A kernel that reads host memory gets at least this much at a time.
HOST_SECTOR_BYTES = 32
SUBSPACE_ITERATIONS = 8


@dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """One new token for each of `batch` sequences of one size.

    Attributes:
        hit_rate: share of candidate chunks, and of selected tokens, that are resident.
    """

    shape: ModelShape
    config: ShadowKVConfig
    size: SequenceSize
    batch: int
    hit_rate: float
    implementation: Implementation

    @property
    def num_rows(self) -> int:
        """B H."""
        return self.batch * self.shape.num_kv_heads

    @property
    def num_query_rows(self) -> int:
        """B H G."""
        return self.batch * self.shape.num_heads

    @property
    def num_candidate_tokens(self) -> int:
        """m c."""
        return self.size.num_candidate_chunks * self.size.chunk_size

    @property
    def num_selected_tokens(self) -> int:
        """t."""
        return min(self.size.num_selected_chunks * self.size.chunk_size, self.num_candidate_tokens)

    @property
    def miss_rate(self) -> float:
        """Share that is not resident; everything where nothing stays."""
        return 1 - self.hit_rate if self.size.num_slots else 1.0

    @property
    def vector_bytes(self) -> int:
        """D e."""
        return self.shape.head_dim * self.shape.element_bytes


def score_chunks(step: DecodeStep) -> Work:
    """Landmarks once, B H C D e; logits of all query heads written and read, scores written."""
    shape, implementation, num_chunks = step.shape, step.implementation, step.size.num_chunks
    landmarks = step.num_rows * num_chunks * vector_bytes(shape.head_dim, shape, step.config.factor_dtype)
    logits = step.num_query_rows * num_chunks * implementation.score_bytes
    scores = logits if implementation.separate_group_max else logits / (shape.num_heads // shape.num_kv_heads)
    return Work(
        device_bytes=landmarks + 2 * logits + scores + step.num_query_rows * step.vector_bytes,
        operations={"bf16": 2 * step.num_query_rows * num_chunks * shape.head_dim},
        num_kernels=implementation.score_kernels,
    )


def group_max(step: DecodeStep) -> Work:
    """Maximum over query heads, where it is an operator of its own: reads B H G C scores, writes B H C and places."""
    read = step.num_query_rows * step.size.num_chunks * step.implementation.score_bytes
    written = step.num_rows * step.size.num_chunks * (step.implementation.score_bytes + INDEX_BYTES)
    return Work(device_bytes=read + written, num_kernels=1)


def top_chunks(step: DecodeStep) -> Work:
    """The m best of C scores per row."""
    return _top(step, step.size.num_chunks, step.size.num_candidate_chunks)


def _top(step: DecodeStep, num_scores: int, num_wanted: int) -> Work:
    implementation = step.implementation
    read = step.num_rows * num_scores * implementation.score_bytes * implementation.top_passes
    return Work(device_bytes=read + step.num_rows * num_wanted * INDEX_BYTES, num_kernels=implementation.top_kernels)


def plan_chunks(step: DecodeStep) -> Work:
    """Candidates matched with slots: chunk and age of every slot read and written, slot and hit per candidate."""
    slots, candidates = step.size.num_slots, step.size.num_candidate_chunks
    if not slots:
        return Work()
    return Work(device_bytes=step.num_rows * (4 * slots + 2 * candidates) * INDEX_BYTES, num_kernels=1)


def fetch_values(step: DecodeStep) -> Work:
    """Values of selected tokens that are not resident: from their store into a slot, in the model's type."""
    config, num_tokens = step.config, step.num_rows * step.num_selected_tokens
    stored = vector_bytes(step.shape.head_dim, step.shape, config.value_dtype)
    on_host = config.value_store == "host"
    if on_host and config.value_dtype is not None:
        stored += HOST_SECTOR_BYTES - SCALE_BYTES
    missed = num_tokens * step.miss_rate
    moved = 2 * num_tokens * step.hit_rate * step.vector_bytes if step.implementation.moves_hits else 0
    return Work(
        device_bytes=missed * (step.vector_bytes + (0 if on_host else stored)) + moved,
        link_bytes=missed * stored if on_host else 0,
        num_kernels=1,
    )


def rebuild_keys(step: DecodeStep) -> Work:
    """Keys of candidates that are not resident: RoPE(factors [r] x basis [r, D] + mean), B H m c misses.

    Each KV head has its own chunks: factor rows and rotations are read per head, the basis once per sequence.
    """
    shape, config = step.shape, step.config
    missed = step.num_rows * step.num_candidate_tokens * step.miss_rate
    moves = step.implementation.moves_hits
    moved = 2 * step.num_rows * step.num_candidate_tokens * step.hit_rate * step.vector_bytes if moves else 0
    if config.key_store == "exact":
        stored = vector_bytes(shape.head_dim, shape, config.value_dtype)
        on_host = config.value_store == "host"
        return Work(
            device_bytes=missed * (step.vector_bytes + (0 if on_host else stored)) + moved,
            link_bytes=missed * stored if on_host else 0,
            num_kernels=1,
        )
    rank = step.size.segments[0].rank
    factors = missed * vector_bytes(rank, shape, config.factor_dtype)
    rotations = missed * shape.rotary_dim * shape.element_bytes
    basis = step.num_rows * (rank + 1) * step.vector_bytes
    return Work(
        device_bytes=factors + rotations + basis + missed * step.vector_bytes + moved,
        operations={"bf16": 2 * missed * rank * shape.head_dim},
        num_kernels=step.implementation.rebuild_kernels,
    )


def choose_tokens(step: DecodeStep) -> Work:
    """Where candidates are more than the budget: logits of their tokens, and the t largest per row.

    Reads the candidates' keys; `sparse_attention` then needs only those of chosen tokens.
    """
    tokens = step.num_candidate_tokens
    if tokens <= step.num_selected_tokens:
        return Work()
    logits = step.num_query_rows * tokens * LOGIT_BYTES
    work = Work(
        device_bytes=step.num_rows * tokens * step.vector_bytes + logits,
        operations={"bf16": 2 * step.num_query_rows * tokens * step.shape.head_dim},
        num_kernels=1,
    )
    return work + _top(step, tokens, step.num_selected_tokens)


def sparse_attention(step: DecodeStep) -> Work:
    """Keys and values of chosen and of exact tokens, 2 B H (t + exact) D e."""
    num_tokens = step.num_selected_tokens + step.size.num_exact_tokens
    return full_attention(step.shape, step.batch, num_tokens)


def summarize_keys(shape: ModelShape, config: ShadowKVConfig, num_tokens: int) -> Work:
    """A prompt's keys: read once for landmarks, cosines and Gram matrix, once for the factors.

    Products in TF32: Gram 2 n W^2 and factors 2 n W r; the basis by subspace iteration on the Gram matrix.
    """
    width, rank = shape.key_width, config.prompt_rank(shape.key_width)
    keys = num_tokens * width * shape.element_bytes
    factors = num_tokens * vector_bytes(rank, shape, config.factor_dtype)
    landmarks = num_tokens / config.chunk_size * shape.num_kv_heads
    landmark_bytes = landmarks * vector_bytes(shape.head_dim, shape, config.factor_dtype)
    queries = num_tokens * shape.query_width * shape.element_bytes if config.query_weighted else 0
    low_rank = config.key_store == "low_rank"
    operations = 2 * num_tokens * width * (width + rank) + SUBSPACE_ITERATIONS * 2 * width * rank * (width + 2 * rank)
    return Work(
        device_bytes=keys + landmark_bytes + queries + (keys + factors if low_rank else 0),
        operations={"tf32": operations} if low_rank else {},
        num_kernels=2 + SUBSPACE_ITERATIONS * 4 if low_rank else 1,
    )


def store_values(shape: ModelShape, config: ShadowKVConfig, num_tokens: int) -> Work:
    """A prompt's values into their store, quantised on the way."""
    read = num_tokens * shape.key_width * shape.element_bytes
    stored = num_tokens * shape.num_kv_heads * vector_bytes(shape.head_dim, shape, config.value_dtype)
    stored *= 2 if config.key_store == "exact" else 1
    on_host = config.value_store == "host"
    return Work(device_bytes=read + (0 if on_host else stored), link_bytes=stored if on_host else 0, num_kernels=1)
