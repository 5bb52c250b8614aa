"""How ShadowKV's operators are implemented, as far as bytes and kernels depend on it.

The model of the published implementation and that of this package's operators differ in nothing else.
"""

from dataclasses import dataclass, replace

from longshadow.engine.shadowkv.config import ShadowKVConfig

# Of the selected chunks, those selected in the step before, too (arXiv 2410.21465, figure 5).
PUBLISHED_HIT_RATE = 0.6


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """What operators do beyond what every implementation must.

    Attributes:
        replayed: kernels are replayed from a CUDA graph instead of launched one by one.
        score_bytes: of a logit and of a score.
        separate_group_max: the maximum over the query heads of a KV head is an operator of its own, which also writes
            the place of the maximum as int64.
        score_kernels, top_kernels, rebuild_kernels, qkv_kernels, ffn_kernels: launches of an operator; fetching and
            planning take one, attention two (its parts, and their combination).
        other_kernels: a layer's norms, rotations, residuals and appends to the cache.
        head_kernels: once per step, the head and sampling.
        top_passes: over the scores.
        moves_hits: chunks that stay are moved to the front of their buffer.
        landmark_id_bytes: kept beside each landmark.
        keeps_rotations: cos and sin of compressed tokens are kept.
        keeps_token_ids: the text is kept, for comparison with a later turn's.
    """

    replayed: bool = True
    score_bytes: int = 4
    separate_group_max: bool = False
    score_kernels: int = 2
    top_kernels: int = 1
    rebuild_kernels: int = 1
    qkv_kernels: int = 3
    ffn_kernels: int = 5
    other_kernels: int = 32
    head_kernels: int = 12
    top_passes: int = 5
    moves_hits: bool = False
    landmark_id_bytes: int = 0
    keeps_rotations: bool = True
    keeps_token_ids: bool = True


# Fused operators, one launch each, in transformers' modules (a norm is eight of their kernels, a rotation five),
# replayed from a CUDA graph. The radix selection reads 32-bit scores once per digit of eight bits and once to collect.
FUSED = Implementation()

# ByteDance-Seed/ShadowKV at e51904c, eager: a CUTLASS product with two softmax kernels around bf16 scores, torch.max
# with indices, torch.topk (several blocks per row: two digits of a bf16 score, counts, prefix sums, sort), gathered
# landmark numbers, a key buffer that is compacted before the product and rotated after it.
ORIGINAL = Implementation(
    replayed=False,
    score_bytes=2,
    separate_group_max=True,
    score_kernels=3,
    top_kernels=17,
    rebuild_kernels=3,
    qkv_kernels=1,
    ffn_kernels=3,
    other_kernels=8,
    top_passes=3,
    moves_hits=True,
    landmark_id_bytes=8,
    keeps_rotations=False,
    keeps_token_ids=False,
)

_ORIGINAL_CONFIG = ShadowKVConfig(
    rank=160,
    chunk_size=8,
    num_sink_chunks=0,
    local_tokens=32,
    candidate_factor=1,
    resident_factor=1,
    center_keys=False,
    query_weighted=False,
)


def original_config(budget_tokens: int) -> ShadowKVConfig:
    """The settings of the published measurements; the number of outlier chunks follows from the budget."""
    return replace(_ORIGINAL_CONFIG, budget_tokens=budget_tokens, num_outlier_chunks=max(1, budget_tokens // 1024 * 24))
