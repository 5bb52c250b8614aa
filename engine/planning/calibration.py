"""One efficiency per ceiling, fitted on one published row: Llama-3-8B-1M, 24 sequences of 128K tokens, one A100.

Each ceiling is fitted on what it alone bounds there: launches on the top-k (seventeen short kernels), device memory on
the sum of scoring, attention and matrix products (table 13), the link on the fetch of values; and tensor cores, which
bound nothing of that step, on the attention over a prompt of the same length (table 12). `judgement` compares
all other rows.
"""

from functools import cache

from longshadow.engine.planning.hardware import A100
from longshadow.engine.planning.implementation import ORIGINAL, original_config
from longshadow.engine.planning.published import BLOCK_COLUMNS, BLOCKS, PREFILLS, BlockTimes, published_budget
from longshadow.engine.planning.reading import SHAPES
from longshadow.engine.planning.steps import Efficiency, Load, layer_operators, prefill_attention

PUBLISHED_MODEL = SHAPES["llama-3-8b-1m"]
FITTED_CONTEXT = 128
MEMORY_BOUND = ("score_chunks", "sparse_attention", "ffn", "qkv")
# The published benchmarks generate 100 tokens.
MEAN_NEW_TOKENS = 50


def block_load(row: BlockTimes) -> Load:
    """What a row of table 13 ran."""
    return Load(
        shape=PUBLISHED_MODEL,
        config=original_config(published_budget(row.context)),
        batch=row.batch,
        num_prompt_tokens=1024 * row.context,
        num_new_tokens=MEAN_NEW_TOKENS,
    )


@cache
def fitted() -> Efficiency:
    """From the row of 128K tokens: bytes x and kernels y with b x + n y = t for the top-k and for the sum."""
    [row] = [row for row in BLOCKS if row.context == FITTED_CONTEXT]
    seconds = {name: time / 1e3 for name, time in zip(BLOCK_COLUMNS, row.milliseconds, strict=True)}
    works = layer_operators(block_load(row), ORIGINAL)
    top, kernels = works["top_chunks"].device_bytes, works["top_chunks"].num_kernels
    all_bytes = sum(works[name].device_bytes for name in MEMORY_BOUND)
    all_kernels = sum(works[name].num_kernels for name in MEMORY_BOUND)
    all_seconds = sum(seconds[name] for name in MEMORY_BOUND)
    determinant = all_bytes * kernels - top * all_kernels
    per_byte = (all_seconds * kernels - seconds["top_chunks"] * all_kernels) / determinant
    per_kernel = (all_bytes * seconds["top_chunks"] - top * all_seconds) / determinant
    fetching = seconds["fetch_values"] - works["fetch_values"].num_kernels * per_kernel
    [prompt] = [prompt for prompt in PREFILLS if prompt.context == FITTED_CONTEXT]
    operations = prefill_attention(PUBLISHED_MODEL, 1024 * FITTED_CONTEXT).operations["bf16"]
    return Efficiency(
        bandwidth=1 / (per_byte * A100.bandwidth),
        link=works["fetch_values"].link_bytes / (fetching * A100.link_bandwidth),
        tensor_cores=operations / (prompt.attention / 1e3 * A100.tensor_rate("bf16")),
        launch=A100.launch_seconds / per_kernel,
    )
