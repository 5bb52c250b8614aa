"""Measurements of the original implementation, which the cost model is fitted to and judged on.

arXiv 2410.21465v3, one A100-80GB: tables 3, 4, 12, 13 and 14. Contexts are in units of 1,024 tokens. The settings are
those of the implementation's own benchmark: chunks of 8, rank 160, budgets of 1/64 of the context.
"""

from dataclasses import dataclass

BLOCK_COLUMNS = (
    "score_chunks",
    "group_max",
    "top_chunks",
    "rebuild_keys",
    "fetch_values",
    "sparse_attention",
    "ffn",
    "qkv",
)


@dataclass(frozen=True, kw_only=True)
class BlockTimes:
    """Milliseconds of one decoding step in one block of Llama-3-8B-1M, by operator (table 13)."""

    batch: int
    context: int
    milliseconds: tuple[float, ...]


BLOCKS = (
    BlockTimes(batch=48, context=64, milliseconds=(0.56, 0.07, 0.14, 1.25, 1.84, 0.23, 0.33, 0.05)),
    BlockTimes(batch=24, context=128, milliseconds=(0.58, 0.07, 0.15, 1.36, 1.66, 0.21, 0.29, 0.05)),
    BlockTimes(batch=12, context=256, milliseconds=(0.65, 0.07, 0.16, 1.49, 1.75, 0.19, 0.25, 0.05)),
    BlockTimes(batch=6, context=512, milliseconds=(0.71, 0.07, 0.17, 1.51, 1.69, 0.18, 0.23, 0.05)),
)


@dataclass(frozen=True, kw_only=True)
class PrefillTimes:
    """Milliseconds of one block of Llama-3-8B-1M over one prompt (table 12)."""

    context: int
    svd: float
    attention: float


PREFILLS = (
    PrefillTimes(context=64, svd=17.19, attention=186),
    PrefillTimes(context=128, svd=26.6, attention=721),
    PrefillTimes(context=256, svd=50.6, attention=2880),
    PrefillTimes(context=512, svd=108.4, attention=11_720),
)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Tokens/s of a model at the largest batches (table 3).

    `same_batch` is full attention at ShadowKV's batch and `infinite_batch` its bound, both projected by the paper.
    """

    model: str
    context: int
    full_batch: int
    full: float
    shadowkv_batch: int
    shadowkv: float
    same_batch: float
    infinite_batch: float


def _rows(model: str, *rows: tuple[int, int, float, int, float, float, float]) -> tuple[Throughput, ...]:
    return tuple(
        Throughput(
            model=model,
            context=context,
            full_batch=full_batch,
            full=full,
            shadowkv_batch=shadowkv_batch,
            shadowkv=shadowkv,
            same_batch=same_batch,
            infinite_batch=infinite_batch,
        )
        for context, full_batch, full, shadowkv_batch, shadowkv, same_batch, infinite_batch in rows
    )


THROUGHPUTS = (
    *_rows(
        "llama-3-8b-1m",
        (60, 8, 160.62, 48, 455.14, 168.72, 273.07),
        (122, 4, 80.77, 24, 239.51, 83.05, 134.30),
        (244, 2, 40.37, 12, 119.01, 52.00, 67.15),
    ),
    *_rows(
        "llama-3.1-8b",
        (60, 8, 160.93, 48, 472.77, 168.72, 273.07),
        (122, 4, 80.78, 24, 245.90, 83.05, 134.30),
    ),
    *_rows(
        "glm-4-9b-1m",
        (60, 12, 241.05, 50, 615.89, 266.24, 436.91),
        (122, 6, 122.67, 25, 293.40, 158.83, 214.87),
        (244, 3, 61.13, 12, 136.51, 78.84, 107.44),
    ),
    *_rows(
        "yi-9b-200k",
        (60, 10, 204.81, 42, 544.36, 271.21, 364.09),
        (122, 5, 101.44, 21, 260.03, 133.53, 179.06),
        (244, 2, 46.74, 10, 118.55, 65.79, 89.53),
    ),
)


@dataclass(frozen=True, kw_only=True)
class SmallBatch:
    """Tokens/s of Llama-3-8B-1M at the same batch (table 4)."""

    context: int
    batch: int
    full: float
    shadowkv: float


SMALL_BATCHES = (
    SmallBatch(context=60, batch=2, full=89.2, shadowkv=89.7),
    SmallBatch(context=60, batch=8, full=160.6, shadowkv=244.2),
    SmallBatch(context=122, batch=2, full=65.1, shadowkv=65.6),
    SmallBatch(context=122, batch=4, full=80.8, shadowkv=115.0),
    SmallBatch(context=244, batch=2, full=40.4, shadowkv=48.4),
)

# Table 14, three sequences of 1M tokens, tokens/s: full attention does not fit, or keeps its cache in host memory.
MILLION_BATCH, MILLION_CONTEXT = 3, 1024
MILLION_OFFLOADED, MILLION_QUEST, MILLION_SHADOWKV = 0.21, 9.34, 45.32

# The most the implementation can select is 1,024 chunks of 8 tokens.
LARGEST_BUDGET = 8192


def published_budget(context: int) -> int:
    """Tokens selected per step at a context of so many times 1,024 tokens: 1/64 of the next power of two."""
    return min(1024 * (1 << (context - 1).bit_length()) // 64, LARGEST_BUDGET)
