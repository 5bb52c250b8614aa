"""The rows of the quality tables: a way to attend, made from one exact prefill that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from bench.baselines.exact_cache import ExactCache, exact_attention
from bench.baselines.selections import ORACLE, selection_makers
from longshadow import ShadowKVCache, ShadowKVConfig

FULL_ATTENTION = "full attention"
AS_PUBLISHED = "ShadowKV as published"
CHUNK_TOKENS = 8
SINK_CHUNKS = 1
SMALLEST_SEGMENT, LARGEST_SEGMENT = 64, 512


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """What is decoded after the shared prefill, from which ShadowKV's budget follows.

    Attributes:
        prompt_tokens: tokens of the shared exact prefill.
        turn_tokens: tokens of a later turn's prompt, before decoding.
        steps: decoded tokens.
        teacher_forced: the decoded tokens are known in advance.
        local_tokens: as in `ShadowKVConfig`.
    """

    prompt_tokens: int
    turn_tokens: int = 0
    steps: int
    teacher_forced: bool = False
    local_tokens: int = 32

    def mean_context(self) -> float:
        """Tokens that a decoded token sees, its own included, mean over the steps."""
        return self.prompt_tokens + self.turn_tokens + (self.steps + 1) / 2

    def mean_tail(self, segment_tokens: int) -> float:
        """Exact tokens after ShadowKV's last segment, mean over the steps."""
        old = (self.prompt_tokens - self.local_tokens) // CHUNK_TOKENS * CHUNK_TOKENS
        tail = self.prompt_tokens - old + self.turn_tokens
        total = 0
        for _ in range(self.steps):
            tail += 1
            if tail - self.local_tokens >= segment_tokens:
                tail -= segment_tokens
            total += tail
        return total / self.steps

    def segment_tokens(self, budget: float) -> int:
        """The largest segment, a power of two, whose uncompressed tokens take at most a quarter of the budget."""
        size = LARGEST_SEGMENT
        while size > SMALLEST_SEGMENT and self.mean_tail(size) > budget / 4:
            size //= 2
        return size


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row. `fraction` is of all visible tokens, everything attended counted."""

    name: str
    fraction: float
    rank: int | None = None
    key_store: Literal["low_rank", "exact"] | None = None
    as_published: bool = False

    @property
    def is_shadowkv(self) -> bool:
        """Whether this is longshadow's own cache rather than a baseline."""
        return self.key_store is not None


def all_methods(fractions: Sequence[float], ranks: Sequence[int]) -> list[Method]:
    """Full attention, and at each fraction ShadowKV (each rank, exact keys, as published) and the baselines."""
    methods = [Method(name=FULL_ATTENTION, fraction=1.0)]
    for fraction in fractions:
        methods += [
            Method(name=f"ShadowKV rank {rank}", fraction=fraction, rank=rank, key_store="low_rank") for rank in ranks
        ]
        methods += [
            Method(name="ShadowKV exact keys", fraction=fraction, key_store="exact"),
            Method(
                name=f"{AS_PUBLISHED}, rank {ranks[0]}",
                fraction=fraction,
                rank=ranks[0],
                key_store="low_rank",
                as_published=True,
            ),
            *(Method(name=name, fraction=fraction) for name in selection_makers(fraction)),
        ]
    return methods


def shadowkv_config(method: Method, plan: DecodePlan) -> ShadowKVConfig:
    """A configuration that attends to `method.fraction` of the context, sink, outliers, selected and tail together.

    An eighth of the budget goes to outlier chunks, and what sink, outliers and tail leave to the selection. Raises
    ValueError when that is less than a chunk.
    """
    assert method.key_store is not None
    total = method.fraction * plan.mean_context()
    segment_tokens = plan.segment_tokens(total)
    num_outliers = round(total / 8 / CHUNK_TOKENS)
    rest = total - (SINK_CHUNKS + num_outliers) * CHUNK_TOKENS - plan.mean_tail(segment_tokens)
    num_selected = round(rest / CHUNK_TOKENS)
    if num_selected < 1:
        raise ValueError(f"an attended fraction of {method.fraction:.4f} leaves ShadowKV nothing to select")
    config = ShadowKVConfig(
        budget_tokens=num_selected * CHUNK_TOKENS,
        rank=method.rank,
        chunk_size=CHUNK_TOKENS,
        num_sink_chunks=SINK_CHUNKS,
        num_outlier_chunks=num_outliers,
        local_tokens=plan.local_tokens,
        segment_tokens=segment_tokens,
        key_store=method.key_store,
        dense_threshold=0,
    )
    return replace(config, candidate_factor=1.0, query_weighted=False) if method.as_published else config


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of the visible tokens, mean over decoded tokens: attended, and those whose own key met the query."""

    attended: float
    scored: float


@contextmanager
def open_cache(
    model: PreTrainedModel, prefill: ExactCache, method: Method, plan: DecodePlan
) -> Iterator[tuple[Cache, Callable[[], Shares]]]:
    """A cache that continues `prefill` by `method`, and a function that tells the shares of tokens so far."""
    assert prefill.get_seq_length() == plan.prompt_tokens
    if method.is_shadowkv:
        config = shadowkv_config(method, plan)
        with ShadowKVCache.from_exact(model, config, prefill.to_dynamic(), prefill.query_energies) as shadow:

            def shares() -> Shares:
                statistics = shadow.statistics()
                return Shares(attended=statistics.attended_fraction, scored=statistics.scored_fraction)

            yield shadow, shares
        return
    make_selection = None if method.name == FULL_ATTENTION else selection_makers(method.fraction)[method.name]
    exact = prefill.fork(make_selection, teacher_forced=plan.teacher_forced)
    with exact_attention(model):
        yield (
            exact,
            lambda: Shares(
                attended=exact.attended_fraction,
                scored=1.0 if method.name == ORACLE else exact.attended_fraction,
            ),
        )
