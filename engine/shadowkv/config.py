"""What a user chooses about a ShadowKV cache, and the sizes that follow from it."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

DEFAULT_BUDGET_FRACTION = 0.0156
DEFAULT_BUDGET_TOKENS = 512
DEFAULT_RANK = 160
MINIMUM_SEGMENT_TOKENS = 512
MINIMUM_DENSE_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class ShadowKVConfig:
    """Configuration of a `ShadowKVCache` (names as in arXiv 2410.21465).

    Args:
        budget_tokens: tokens selected per decoding step and KV head. At most one of the two budgets may be
            given; without any, the larger of 1.56 % of the context and 512 tokens.
        budget_fraction: the same as a share of the context, 0 < fraction <= 1.
        rank: rank of the pre-RoPE key cache, jointly over the KV heads of a layer (1 .. KV heads x head_dim).
            Default: min(160, a third of KV heads x head_dim).
        rank_energy: instead of a fixed rank, the smallest rank that keeps this share of the keys' energy,
            weighted where `query_weighted` is, per layer and segment, 0 < share <= 1.
        center_keys: subtract the mean key before the factorisation (it pays where `k_proj` has a bias).
        chunk_size: tokens per chunk, the unit of selection, 1 .. 64.
        num_sink_chunks: chunks at the start of the context that are always attended exactly.
        num_outlier_chunks: chunks of the prompt, per KV head, that their landmark describes worst; kept and
            attended exactly. Later segments get a number proportional to their length.
        local_tokens: the most recent tokens, kept exactly; at least 1.
        segment_tokens: generated tokens are compressed in segments of this many (>= 64). Default: the larger
            of 512 and 2 x KV heads x head_dim, so that the segment's basis is small beside its tokens.
        dense_threshold: contexts up to this many tokens stay exact and are attended fully. Default: the
            larger of 1,024 and what a sparse step would attend anyway; 0 compresses every context.
        candidate_factor: keys are rebuilt for this many times the budget's chunks, those with the best landmarks;
            of their tokens the budget's share with the largest attention weights is attended, and only its values
            are fetched. At least 1; 1 attends to every token of the chunks, as published.
        query_weighted: weight the low-rank approximation of the keys by what the prompt's queries look at,
            instead of approximating all elements alike, as published.
        resident_factor: candidate chunks kept between steps, least recently used first out, as a multiple of
            the candidates: 0 (none) or >= 1. Default: 1 on a GPU; 0 on a CPU, where keeping costs more than
            it saves.
        key_store: "low_rank" rebuilds selected keys; "exact" stores them beside the values.
        value_store: "host" (main memory, pinned where there is a GPU) or "device".
        value_dtype: None (the model's) or "int8" (a scale per token and head), also for exact stored keys.
        factor_dtype: None (the model's), "int8" or "fp8" (e4m3) for the low-rank factor, a scale per token, and the
            landmarks, a scale per chunk and head. int8 is the more accurate of the two.
        prefill_chunk_size: must equal `generate(prefill_chunk_size=...)` when prompts are prefilled in
            chunks (default: the model's generation_config's): forwards of exactly this many tokens are
            taken as unfinished prompts and stay exact until the prompt's last chunk.
        sparse_prompts: later turns' prompt tokens select chunks too, each its own, instead of attending
            to the whole history.
    """

    budget_tokens: int | None = None
    budget_fraction: float | None = None
    rank: int | None = None
    rank_energy: float | None = None
    center_keys: bool = True
    chunk_size: int = 8
    num_sink_chunks: int = 1
    num_outlier_chunks: int = 8
    local_tokens: int = 32
    segment_tokens: int | None = None
    dense_threshold: int | None = None
    candidate_factor: float = 3.0
    query_weighted: bool = True
    resident_factor: float | None = None
    key_store: Literal["low_rank", "exact"] = "low_rank"
    value_store: Literal["device", "host"] = "host"
    value_dtype: Literal["int8"] | None = None
    factor_dtype: Literal["int8", "fp8"] | None = None
    prefill_chunk_size: int | None = None
    sparse_prompts: bool = False

    def __post_init__(self) -> None:
        if self.budget_tokens is not None and self.budget_fraction is not None:
            raise ValueError("give budget_tokens or budget_fraction, not both")
        if self.rank is not None and self.rank_energy is not None:
            raise ValueError("give rank or rank_energy, not both")
        _check_at_least("budget_tokens", self.budget_tokens, 1)
        _check_share("budget_fraction", self.budget_fraction)
        _check_at_least("rank", self.rank, 1)
        _check_share("rank_energy", self.rank_energy)
        _check_at_least("num_sink_chunks", self.num_sink_chunks, 0)
        _check_at_least("num_outlier_chunks", self.num_outlier_chunks, 0)
        _check_at_least("local_tokens", self.local_tokens, 1)
        _check_at_least("segment_tokens", self.segment_tokens, 64)
        _check_at_least("dense_threshold", self.dense_threshold, 0)
        _check_at_least("prefill_chunk_size", self.prefill_chunk_size, 2)
        if not 1 <= self.chunk_size <= 64:
            raise ValueError(f"chunk_size must be between 1 and 64, got {self.chunk_size}")
        if not 1 <= self.candidate_factor < math.inf:
            raise ValueError(f"candidate_factor must be at least 1, got {self.candidate_factor}")
        if self.resident_factor not in (None, 0) and not 1 <= self.resident_factor < math.inf:
            raise ValueError(f"resident_factor must be 0 or at least 1, got {self.resident_factor}")
        _check_one_of("key_store", self.key_store, ("low_rank", "exact"))
        _check_one_of("value_store", self.value_store, ("device", "host"))
        _check_one_of("value_dtype", self.value_dtype, (None, "int8"))
        _check_one_of("factor_dtype", self.factor_dtype, (None, "int8", "fp8"))

    def budget(self, num_tokens: int) -> int:
        """Tokens to select per step and KV head when `num_tokens` are stored."""
        if self.budget_tokens is not None:
            return self.budget_tokens
        if self.budget_fraction is not None:
            return math.ceil(self.budget_fraction * num_tokens)
        return max(math.ceil(DEFAULT_BUDGET_FRACTION * num_tokens), DEFAULT_BUDGET_TOKENS)

    def num_resident_chunks(self, num_candidates: int, device: "torch.device") -> int:
        """Slots for `num_candidates` chunks per step and KV head."""
        factor = self.resident_factor
        if factor is None:
            factor = 0 if device.type == "cpu" else 1
        return round(factor * num_candidates)

    def num_selected_chunks(self, num_tokens: int) -> int:
        """Chunks to select per step and KV head when `num_tokens` are stored."""
        return math.ceil(self.budget(num_tokens) / self.chunk_size)

    def prompt_rank(self, width: int) -> int:
        """Rank of a prompt's key cache whose joint key has `width` = KV heads x head_dim elements."""
        if self.rank is None:
            return min(DEFAULT_RANK, math.ceil(width / 3))
        if self.rank > width:
            raise ValueError(f"rank must be between 1 and KV heads x head_dim = {width}, got {self.rank}")
        return self.rank

    def generated_rank(self, width: int, num_tokens: int) -> int:
        """Rank at which `num_tokens` generated tokens, basis included, cost what prompt tokens do.

        A basis of rank r costs r x width elements. Spread over few tokens that is much, so r shrinks until
        r (num_tokens + width) = rank x num_tokens.
        """
        return max(1, round(self.prompt_rank(width) * num_tokens / (num_tokens + width)))

    def generated_segment_tokens(self, width: int) -> int:
        """Generated tokens that make a segment, a multiple of the chunk size."""
        tokens = self.segment_tokens or max(MINIMUM_SEGMENT_TOKENS, 2 * width)
        return math.ceil(tokens / self.chunk_size) * self.chunk_size

    def runs_dense(self, num_tokens: int) -> bool:
        """Whether a context of `num_tokens` stays exact and is attended fully."""
        if self.dense_threshold is not None:
            return num_tokens <= self.dense_threshold
        always_attended = (self.num_sink_chunks + self.num_outlier_chunks) * self.chunk_size + self.local_tokens
        return num_tokens <= max(MINIMUM_DENSE_TOKENS, self.budget(num_tokens) + always_attended)


def _check_at_least(name: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _check_share(name: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")


def _check_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
