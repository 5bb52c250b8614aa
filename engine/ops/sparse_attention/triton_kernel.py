"""`sparse_attention` in Triton: split-K, that is partial results of parts, then their combination.

The tokens at `places` and the tokens of all regions form one line of work, which the programs of a (sequence, head)
pair share evenly, whatever the regions' lengths. Keys and values are read once, where they lie.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from longshadow.engine.ops.checks import check_contiguous, check_query, check_workspace
from longshadow.engine.ops.configuration import Configuration
from longshadow.engine.ops.sparse_attention import sparse_attention_workspace
from longshadow.engine.ops.splits import num_token_splits
from longshadow.engine.ops.triton_functions import (
    FLOOR,
    GROUP,
    NUM_REGION_FIELDS,
    REGION_KEY_HEAD_STRIDE,
    REGION_KEYS,
    REGION_VALUE_HEAD_STRIDE,
    REGION_VALUES,
    STAGE_BYTES,
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

# Parts whose sums are added up at once.
PARTS_BLOCK = tl.constexpr(16)


@triton.jit
def attend(vectors, keys, values, valid, maximum, total, summed, scaling, softcap, SOFTCAP: tl.constexpr):
    """Adds a tile of keys and values to the running softmax of [GROUP] queries."""
    x = cap_logits(tl.dot(vectors, tl.trans(keys), input_precision="ieee") * scaling, softcap, SOFTCAP)
    x = tl.where(valid[None, :], x, float("-inf"))
    raised = tl.maximum(maximum, tl.max(x, 1))
    decay = tl.exp(maximum - raised)
    weights = tl.exp(x - raised[:, None])
    total = total * decay + tl.sum(weights, 1)
    summed = tl.dot(weights.to(values.dtype), values, summed * decay[:, None], input_precision="ieee")
    return raised, total, summed


@triton.jit(do_not_specialize=["num_places", "num_slots", "num_regions"])
def sparse_attention_parts(
    query,
    places,
    key_slots,
    value_slots,
    regions,
    part_sums,
    partials,
    scaling,
    softcap,
    num_places,
    num_slots,
    num_regions,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    REGIONS: tl.constexpr,
):
    """Grid: parts, heads, sequences."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    pair = sequence * tl.num_programs(1) + head
    dtype: tl.constexpr = query.dtype.element_ty

    regions += sequence * num_regions * NUM_REGION_FIELDS
    firsts, lasts = region_spans(regions, num_regions, REGIONS)
    firsts += num_places
    lasts += num_places
    num_items = tl.max(lasts, 0)
    share = tl.cdiv(tl.cdiv(num_items, tl.num_programs(0)), BLOCK) * BLOCK
    start = split * share
    stop = tl.minimum(start + share, num_items)
    first_region = tl.sum((lasts <= start).to(tl.int32), 0)
    stop_region = tl.sum((firsts < stop).to(tl.int32), 0)

    vectors = load_query(query, pair, G, D, GROUP, WIDTH)
    maximum = tl.full([GROUP], FLOOR, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    summed = tl.zeros([GROUP, VALUE_WIDTH], tl.float32)
    places += pair * num_places
    key_slots += pair * num_slots * CHUNK_SIZE * D
    value_slots += pair * num_slots * CHUNK_SIZE * V
    for tile in range(start, tl.minimum(stop, num_places), BLOCK):
        token = tile + tl.arange(0, BLOCK)
        place = tl.load(places + token, mask=token < num_places, other=-1).to(tl.int64)
        keys = load_rows(key_slots, place, place >= 0, D, WIDTH)
        values = load_rows(value_slots, place, place >= 0, V, VALUE_WIDTH)
        maximum, total, summed = attend(
            vectors, keys, values, place >= 0, maximum, total, summed, scaling, softcap, SOFTCAP
        )

    for region in range(first_region, stop_region):
        fields = regions + region * NUM_REGION_FIELDS
        head_keys = head * tl.load(fields + REGION_KEY_HEAD_STRIDE)
        head_values = head * tl.load(fields + REGION_VALUE_HEAD_STRIDE)
        region_keys = tl.multiple_of(pointer_to(tl.load(fields + REGION_KEYS), dtype) + head_keys, 16)
        region_values = tl.multiple_of(pointer_to(tl.load(fields + REGION_VALUES), dtype) + head_values, 16)
        first = tl.sum(tl.where(tl.arange(0, REGIONS) == region, firsts, 0), 0)
        last = tl.sum(tl.where(tl.arange(0, REGIONS) == region, lasts, 0), 0)
        own_stop = tl.minimum(stop, last) - first
        for tile in range(tl.maximum(start - first, 0), own_stop, BLOCK):
            token = (tile + tl.arange(0, BLOCK)).to(tl.int64)
            keys = load_rows(region_keys, token, token < own_stop, D, WIDTH)
            values = load_rows(region_values, token, token < own_stop, V, VALUE_WIDTH)
            maximum, total, summed = attend(
                vectors, keys, values, token < own_stop, maximum, total, summed, scaling, softcap, SOFTCAP
            )

    part = pair * tl.num_programs(0) + split
    store_partial(partials, part, maximum, total, G, GROUP)
    g = tl.arange(0, GROUP)
    v = tl.arange(0, VALUE_WIDTH)
    rows = part_sums + (part * G + g)[:, None] * V
    tl.store(rows + v[None, :], summed, mask=(g < G)[:, None] & (v < V)[None, :])


@triton.jit(do_not_specialize=["num_parts"])
def sparse_attention_combine(
    part_sums,
    partials,
    sinks,
    out,
    lse,
    num_parts,
    G: tl.constexpr,
    V: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid: query heads of a KV head, KV heads, sequences."""
    group = tl.program_id(0)
    head = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + head
    first_part = pair * num_parts
    maxima, totals = combine_partials(partials, sinks, first_part, num_parts, head, HAS_SINKS, G, ROWS, PARTS)
    mine = tl.arange(0, ROWS) == group
    maximum = tl.sum(tl.where(mine, maxima, 0.0), 0)
    total = tl.sum(tl.where(mine, totals, 0.0), 0)
    v = tl.arange(0, VALUE_WIDTH)
    summed = tl.zeros([VALUE_WIDTH], tl.float32)
    for start in range(0, num_parts, PARTS_BLOCK):
        part = start + tl.arange(0, PARTS_BLOCK)
        part_maximum = tl.load(
            partials + (first_part + part) * 2 * G + group, mask=part < num_parts, other=float("-inf")
        )
        rows = part_sums + ((first_part + part) * G + group)[:, None] * V
        sums = tl.load(rows + v[None, :], mask=(part < num_parts)[:, None] & (v < V)[None, :], other=0.0)
        summed += tl.sum(sums * tl.exp(part_maximum - maximum)[:, None], 0)
    row = pair * G + group
    # A sum of exp(logit - maximum) is 1 or more unless there is nothing to sum.
    total_or_one = tl.maximum(total, 1.0)
    tl.store(out + row * V + v, (summed / total_or_one).to(out.dtype.element_ty), mask=v < V)
    tl.store(lse + row, tl.where(total == 0, float("-inf"), maximum + tl.log(total_or_one)))


def sparse_attention(
    query: torch.Tensor,
    places: torch.Tensor,
    key_slots: torch.Tensor,
    value_slots: torch.Tensor,
    regions: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """See the package."""
    check_contiguous(
        query=query,
        places=places,
        key_slots=key_slots,
        value_slots=value_slots,
        regions=regions,
        out=out,
        lse=lse,
        workspace=workspace,
    )
    batch_size, num_heads, num_groups, key_dim = query.shape
    _, _, num_slots, chunk_size, value_dim = value_slots.shape
    num_places, num_regions = places.shape[2], regions.shape[1]
    check_query(query)
    check_workspace(workspace, sparse_attention_workspace(batch_size, num_heads, num_groups, value_dim, num_places))
    num_pairs = batch_size * num_heads
    num_parts = num_token_splits(num_pairs, num_places)
    num_sums = num_pairs * num_parts * num_groups * value_dim
    part_sums, partials = workspace[:num_sums], workspace[num_sums:]
    parts, options = _choose_parts(
        num_groups, key_dim, value_dim, chunk_size, query.element_size(), bool(softcap), num_regions
    )
    sparse_attention_parts[(num_parts, num_heads, batch_size)](
        query,
        places,
        key_slots,
        value_slots,
        regions,
        part_sums,
        partials,
        scaling,
        softcap,
        num_places,
        num_slots,
        num_regions,
        **parts,
        **options,
    )
    combine, options = _choose_combine(num_groups, value_dim, num_parts, sinks is not None)
    sparse_attention_combine[(num_groups, num_heads, batch_size)](
        part_sums, partials, query if sinks is None else sinks, out, lse, num_parts, **combine, **options
    )


def _choose_parts(
    num_groups: int, key_dim: int, value_dim: int, chunk_size: int, itemsize: int, softcap: bool, num_regions: int
) -> tuple[dict[str, Any], dict[str, int]]:
    width, value_width = padded(key_dim), padded(value_dim)
    row_bytes = (width + value_width) * itemsize
    block = tile_rows(row_bytes, minimum=32 if itemsize == 2 else 16)
    constants = {
        "G": num_groups,
        "D": key_dim,
        "V": value_dim,
        "CHUNK_SIZE": chunk_size,
        "SOFTCAP": softcap,
        "GROUP": GROUP,
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "BLOCK": block,
        "REGIONS": triton.next_power_of_2(num_regions),
    }
    return constants, {"num_warps": 4, "num_stages": 3 if block * row_bytes <= STAGE_BYTES else 2}


def _choose_combine(
    num_groups: int, value_dim: int, num_parts: int, sinks: bool
) -> tuple[dict[str, Any], dict[str, int]]:
    constants = {
        "G": num_groups,
        "V": value_dim,
        "HAS_SINKS": sinks,
        "ROWS": triton.next_power_of_2(num_groups),
        "VALUE_WIDTH": padded(value_dim),
        "PARTS": triton.next_power_of_2(num_parts),
    }
    return constants, {"num_warps": 4, "num_stages": 1}


def _configuration(
    dtype: str, num_groups: int, key_dim: int, value_dim: int, *, chunk_size: int = 8, softcap: bool = False
) -> Configuration:
    constants, options = _choose_parts(num_groups, key_dim, value_dim, chunk_size, 2, softcap, 5)
    return Configuration(
        name=f"parts {dtype} {num_groups} x {key_dim}, {value_dim}{' softcap' if softcap else ''}",
        kernel=sparse_attention_parts,
        signature={
            "query": f"*{dtype}",
            "places": "*i32",
            "key_slots": f"*{dtype}",
            "value_slots": f"*{dtype}",
            "regions": "*i64",
            "part_sums": "*fp32",
            "partials": "*fp32",
            "scaling": "fp32",
            "softcap": "fp32",
            "num_places": "i32",
            "num_slots": "i32",
            "num_regions": "i32",
        },
        constexprs=constants,
        **options,
    )


def _combine_configuration(
    dtype: str, num_groups: int, value_dim: int, num_parts: int, *, sinks: bool
) -> Configuration:
    constants, options = _choose_combine(num_groups, value_dim, num_parts, sinks)
    return Configuration(
        name=f"combine {dtype} {num_groups} x {value_dim} of {num_parts}{' sinks' if sinks else ''}",
        kernel=sparse_attention_combine,
        signature={
            "part_sums": "*fp32",
            "partials": "*fp32",
            "sinks": f"*{dtype}",
            "out": f"*{dtype}",
            "lse": "*fp32",
            "num_parts": "i32",
        },
        constexprs=constants,
        **options,
    )


CONFIGURATIONS = [
    *(_configuration("bf16", 4, head_dim, head_dim) for head_dim in (32, 80, 128, 256)),
    _configuration("fp16", 4, 128, 128),
    _configuration("bf16", 16, 192, 128),
    _configuration("bf16", 2, 256, 256, softcap=True),
    _combine_configuration("bf16", 4, 128, 6, sinks=False),
    _combine_configuration("fp16", 8, 64, 32, sinks=True),
    _combine_configuration("bf16", 2, 256, 64, sinks=False),
]
