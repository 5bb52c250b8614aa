"""`score_tokens` in Triton: one pass over the keys of candidates and regions, in parts, then one over the logits.

Candidates' tokens and the tokens of all regions form one line of work, which the programs of a (sequence, head) pair
share evenly, whatever the regions' lengths. Pass 1 writes the candidates' logits and, per part and query head, the
maximum of all logits and the sum of their exponentials; pass 2 combines these and turns logits into scores.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from longshadow.engine.ops.checks import check_contiguous, check_query, check_workspace
from longshadow.engine.ops.configuration import Configuration
from longshadow.engine.ops.score_tokens import score_tokens_workspace
from longshadow.engine.ops.splits import num_token_splits
from longshadow.engine.ops.triton_functions import (
    FLOOR,
    GROUP,
    NUM_REGION_FIELDS,
    REGION_KEY_HEAD_STRIDE,
    REGION_KEYS,
    best_weight,
    cap_logits,
    combine_partials,
    load_query,
    load_rows,
    padded,
    pointer_to,
    region_spans,
    store_partial,
    tile_rows,
)

# Scores that one program of pass 2 makes.
SCORES_BLOCK = 512


@triton.jit(do_not_specialize=["num_candidates", "num_slots", "num_regions"])
def score_tokens_parts(
    query,
    slots,
    key_slots,
    regions,
    logits,
    partials,
    scaling,
    softcap,
    num_candidates,
    num_slots,
    num_regions,
    G: tl.constexpr,
    D: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    REGIONS: tl.constexpr,
):
    """Grid: parts, heads, sequences."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    pair = sequence * tl.num_programs(1) + head
    dtype: tl.constexpr = query.dtype.element_ty

    num_tokens = num_candidates * CHUNK_SIZE
    regions += sequence * num_regions * NUM_REGION_FIELDS
    firsts, lasts = region_spans(regions, num_regions, REGIONS)
    firsts += num_tokens
    lasts += num_tokens
    num_items = tl.max(lasts, 0)
    share = tl.cdiv(tl.cdiv(num_items, tl.num_programs(0)), BLOCK) * BLOCK
    start = split * share
    stop = tl.minimum(start + share, num_items)
    first_region = tl.sum((lasts <= start).to(tl.int32), 0)
    stop_region = tl.sum((firsts < stop).to(tl.int32), 0)

    g = tl.arange(0, GROUP)
    vectors = load_query(query, pair, G, D, GROUP, WIDTH)
    # Each lane keeps its own maximum and sum: tiles need no reduction.
    maxima = tl.full([GROUP, BLOCK], FLOOR, tl.float32)
    sums = tl.zeros([GROUP, BLOCK], tl.float32)
    slots += pair * num_candidates
    key_slots += pair * num_slots * CHUNK_SIZE * D
    rows = logits + (pair * G + g)[:, None] * num_tokens
    for tile in range(start, tl.minimum(stop, num_tokens), BLOCK):
        token = tile + tl.arange(0, BLOCK)
        inside = token < num_tokens
        slot = tl.load(slots + token // CHUNK_SIZE, mask=inside, other=-1).to(tl.int64)
        keys = load_rows(key_slots, slot * CHUNK_SIZE + token % CHUNK_SIZE, slot >= 0, D, WIDTH)
        x = cap_logits(tl.dot(vectors, tl.trans(keys), input_precision="ieee") * scaling, softcap, SOFTCAP)
        x = tl.where((slot >= 0)[None, :], x, float("-inf"))
        tl.store(rows + token[None, :], x, mask=(g < G)[:, None] & inside[None, :])
        raised = tl.maximum(maxima, x)
        sums = sums * tl.exp(maxima - raised) + tl.exp(x - raised)
        maxima = raised

    for region in range(first_region, stop_region):
        fields = regions + region * NUM_REGION_FIELDS
        head_keys = head * tl.load(fields + REGION_KEY_HEAD_STRIDE)
        region_keys = tl.multiple_of(pointer_to(tl.load(fields + REGION_KEYS), dtype) + head_keys, 16)
        first = tl.sum(tl.where(tl.arange(0, REGIONS) == region, firsts, 0), 0)
        last = tl.sum(tl.where(tl.arange(0, REGIONS) == region, lasts, 0), 0)
        own_stop = tl.minimum(stop, last) - first
        for tile in range(tl.maximum(start - first, 0), own_stop, BLOCK):
            token = (tile + tl.arange(0, BLOCK)).to(tl.int64)
            keys = load_rows(region_keys, token, token < own_stop, D, WIDTH)
            x = cap_logits(tl.dot(vectors, tl.trans(keys), input_precision="ieee") * scaling, softcap, SOFTCAP)
            x = tl.where((token < own_stop)[None, :], x, float("-inf"))
            raised = tl.maximum(maxima, x)
            sums = sums * tl.exp(maxima - raised) + tl.exp(x - raised)
            maxima = raised

    maximum = tl.max(maxima, 1)
    total = tl.sum(sums * tl.exp(maxima - maximum[:, None]), 1)
    store_partial(partials, pair * tl.num_programs(0) + split, maximum, total, G, GROUP)


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def score_tokens_combine(
    logits,
    partials,
    sinks,
    scores,
    num_tokens,
    num_parts,
    G: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of tokens, heads, sequences."""
    head = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + head
    maximum, total = combine_partials(partials, sinks, pair * num_parts, num_parts, head, HAS_SINKS, G, ROWS, PARTS)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.arange(0, ROWS)
    rows = logits + (pair * G + g)[:, None] * num_tokens
    inside = (g < G)[:, None] & (token < num_tokens)[None, :]
    x = tl.load(rows + token[None, :], mask=inside, other=float("-inf"))
    tl.store(scores + pair * num_tokens + token, best_weight(x, maximum, total), mask=token < num_tokens)


def score_tokens(
    query: torch.Tensor,
    slots: torch.Tensor,
    key_slots: torch.Tensor,
    regions: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float,
    scores: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """See the package."""
    check_contiguous(query=query, slots=slots, key_slots=key_slots, regions=regions, scores=scores, workspace=workspace)
    batch_size, num_heads, num_groups, head_dim = query.shape
    num_slots, chunk_size = key_slots.shape[2:4]
    num_candidates, num_tokens, num_regions = slots.shape[2], scores.shape[2], regions.shape[1]
    if num_tokens == 0:
        return
    check_query(query)
    check_workspace(workspace, score_tokens_workspace(batch_size, num_heads, num_groups, num_tokens))
    num_pairs = batch_size * num_heads
    num_parts = num_token_splits(num_pairs, num_tokens)
    num_partials = num_pairs * num_parts * 2 * num_groups
    partials, logits = workspace[:num_partials], workspace[num_partials:]
    parts, options = _choose_parts(num_groups, head_dim, chunk_size, query.element_size(), bool(softcap), num_regions)
    score_tokens_parts[(num_parts, num_heads, batch_size)](
        query,
        slots,
        key_slots,
        regions,
        logits,
        partials,
        scaling,
        softcap,
        num_candidates,
        num_slots,
        num_regions,
        **parts,
        **options,
    )
    combine, options = _choose_combine(num_groups, num_parts, sinks is not None)
    score_tokens_combine[(triton.cdiv(num_tokens, SCORES_BLOCK), num_heads, batch_size)](
        logits, partials, query if sinks is None else sinks, scores, num_tokens, num_parts, **combine, **options
    )


def _choose_parts(
    num_groups: int, head_dim: int, chunk_size: int, itemsize: int, softcap: bool, num_regions: int
) -> tuple[dict[str, Any], dict[str, int]]:
    width = padded(head_dim)
    constants = {
        "G": num_groups,
        "D": head_dim,
        "CHUNK_SIZE": chunk_size,
        "SOFTCAP": softcap,
        "GROUP": GROUP,
        "WIDTH": width,
        "BLOCK": tile_rows(width * itemsize),
        "REGIONS": triton.next_power_of_2(num_regions),
    }
    return constants, {"num_warps": 4, "num_stages": 4}


def _choose_combine(num_groups: int, num_parts: int, sinks: bool) -> tuple[dict[str, Any], dict[str, int]]:
    constants = {
        "G": num_groups,
        "HAS_SINKS": sinks,
        "ROWS": triton.next_power_of_2(num_groups),
        "PARTS": triton.next_power_of_2(num_parts),
        "BLOCK": SCORES_BLOCK,
    }
    return constants, {"num_warps": 4, "num_stages": 1}


def _configuration(
    dtype: str, num_groups: int, head_dim: int, *, chunk_size: int = 8, softcap: bool = False
) -> Configuration:
    constants, options = _choose_parts(num_groups, head_dim, chunk_size, 2, softcap, 5)
    return Configuration(
        name=f"parts {dtype} {num_groups} x {head_dim} c={chunk_size}{' softcap' if softcap else ''}",
        kernel=score_tokens_parts,
        signature={
            "query": f"*{dtype}",
            "slots": "*i32",
            "key_slots": f"*{dtype}",
            "regions": "*i64",
            "logits": "*fp32",
            "partials": "*fp32",
            "scaling": "fp32",
            "softcap": "fp32",
            "num_candidates": "i32",
            "num_slots": "i32",
            "num_regions": "i32",
        },
        constexprs=constants,
        **options,
    )


def _combine_configuration(dtype: str, num_groups: int, num_parts: int, *, sinks: bool) -> Configuration:
    constants, options = _choose_combine(num_groups, num_parts, sinks)
    return Configuration(
        name=f"combine {dtype} {num_groups} x {num_parts}{' sinks' if sinks else ''}",
        kernel=score_tokens_combine,
        signature={
            "logits": "*fp32",
            "partials": "*fp32",
            "sinks": f"*{dtype}",
            "scores": "*fp32",
            "num_tokens": "i32",
            "num_parts": "i32",
        },
        constexprs=constants,
        **options,
    )


CONFIGURATIONS = [
    *(_configuration("bf16", 4, head_dim) for head_dim in (32, 80, 128, 256)),
    _configuration("fp16", 4, 128),
    _configuration("bf16", 16, 128, chunk_size=7),
    _configuration("bf16", 2, 256, softcap=True),
    _combine_configuration("bf16", 4, 6, sinks=False),
    _combine_configuration("bf16", 8, 64, sinks=True),
]
