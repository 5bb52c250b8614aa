"""`score_chunks` in Triton: one pass over the landmarks, in parts, then one over the logits.

Pass 1 writes the logits and, per part and query head, their maximum and the sum of their exponentials. Pass 2 combines
these and turns logits into scores. A part may begin and end anywhere in a segment. Exact chunks, few and ascending,
cut it into runs of chunks that are read without looking at them again.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from longshadow.engine.ops.checks import check_contiguous, check_query, check_workspace
from longshadow.engine.ops.configuration import Configuration
from longshadow.engine.ops.score_chunks import score_chunks_workspace
from longshadow.engine.ops.splits import num_chunk_splits
from longshadow.engine.ops.tables import RowKind
from longshadow.engine.ops.triton_functions import (
    EXACT_CHUNKS,
    FIRST_CHUNK,
    FLOOR,
    FP8,
    GROUP,
    INT8,
    LANDMARK_SCALES,
    LANDMARKS,
    MODEL,
    NUM_CHUNKS,
    NUM_EXACT,
    NUM_FIELDS,
    best_weight,
    cap_logits,
    combine_partials,
    load_query,
    load_rows,
    padded,
    pointer_to,
    store_partial,
    tile_rows,
)

# Exact chunks of a segment that are counted at once, and scores that one program of pass 2 makes.
EXACT_BLOCK = tl.constexpr(64)
SCORES_BLOCK = 512


@triton.jit
def segment_spans(table, num_segments, SEGMENTS: tl.constexpr):
    """Where the chunks of each segment begin and end, [SEGMENTS]; past the last segment both are beyond all."""
    n = tl.arange(0, SEGMENTS)
    rows = table + n * NUM_FIELDS
    counts = tl.load(rows + NUM_CHUNKS, mask=n < num_segments, other=0).to(tl.int32)
    firsts = tl.load(rows + FIRST_CHUNK, mask=n < num_segments, other=0).to(tl.int32)
    num_chunks = tl.sum(counts, 0)
    firsts = tl.where(counts > 0, firsts, num_chunks)
    return firsts, firsts + counts, num_chunks


@triton.jit(do_not_specialize=["num_segments", "max_chunks"])
def score_chunks_parts(
    query,
    table,
    logits,
    partials,
    scaling,
    softcap,
    num_segments,
    max_chunks,
    G: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Grid: parts, heads, sequences."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    pair = sequence * tl.num_programs(1) + head
    dtype: tl.constexpr = query.dtype.element_ty
    element: tl.constexpr = dtype if KIND == MODEL else (tl.int8 if KIND == INT8 else tl.float8e4nv)

    table += sequence * num_segments * NUM_FIELDS
    firsts, lasts, num_chunks = segment_spans(table, num_segments, SEGMENTS)
    share = tl.cdiv(tl.cdiv(num_chunks, tl.num_programs(0)), BLOCK) * BLOCK
    start = split * share
    stop = tl.minimum(start + share, num_chunks)
    first_segment = tl.sum((lasts <= start).to(tl.int32), 0)
    stop_segment = tl.sum((firsts < stop).to(tl.int32), 0)

    g = tl.arange(0, GROUP)
    vectors = load_query(query, pair, G, D, GROUP, WIDTH)
    rows = logits + (pair * G + g)[:, None] * max_chunks
    # Each lane keeps its own maximum and sum: tiles need no reduction.
    maxima = tl.full([GROUP, BLOCK], FLOOR, tl.float32)
    sums = tl.zeros([GROUP, BLOCK], tl.float32)
    for segment in range(first_segment, stop_segment):
        fields = table + segment * NUM_FIELDS
        first = tl.load(fields + FIRST_CHUNK).to(tl.int32)
        count = tl.load(fields + NUM_CHUNKS)
        num_exact = tl.load(fields + NUM_EXACT).to(tl.int32)
        landmarks = pointer_to(tl.load(fields + LANDMARKS), element) + head * count * D
        scales = tl.load(fields + LANDMARK_SCALES).to(tl.pointer_type(tl.float32)) + head * count
        exact = tl.load(fields + EXACT_CHUNKS).to(tl.pointer_type(tl.int64)) + head * num_exact
        run_start = tl.maximum(start - first, 0).to(tl.int64)
        own_stop = tl.minimum(stop - first, count)
        exact_start = 0
        exact_stop = 0
        for block in range(0, num_exact, EXACT_BLOCK):
            e = block + tl.arange(0, EXACT_BLOCK)
            chunks = tl.load(exact + e, mask=e < num_exact, other=1 << 31)
            exact_start += tl.sum((chunks < run_start).to(tl.int32), 0)
            exact_stop += tl.sum((chunks < own_stop).to(tl.int32), 0)
        for e in range(exact_start, exact_stop + 1):
            run_stop = tl.load(exact + e, mask=e < exact_stop, other=1 << 31)
            run_stop = tl.minimum(run_stop, own_stop)
            for tile in range(run_start, run_stop, BLOCK):
                chunk = tile + tl.arange(0, BLOCK)
                inside = chunk < run_stop
                packed = load_rows(landmarks + tile * D, tl.arange(0, BLOCK), inside, D, WIDTH)
                x = tl.dot(vectors, tl.trans(packed.to(dtype)), input_precision="ieee") * scaling
                if KIND != MODEL:
                    x *= tl.load(scales + chunk, mask=inside, other=0.0)[None, :]
                x = tl.where(inside[None, :], cap_logits(x, softcap, SOFTCAP), float("-inf"))
                tl.store(rows + (first + chunk)[None, :], x, mask=(g < G)[:, None] & inside[None, :])
                raised = tl.maximum(maxima, x)
                sums = sums * tl.exp(maxima - raised) + tl.exp(x - raised)
                maxima = raised
            # Only the last run does not end at an exact chunk.
            excluded = tl.where(run_stop < own_stop, G, 0)
            tl.store(
                rows + first + run_stop, tl.full([GROUP, 1], float("-inf"), tl.float32), mask=(g < excluded)[:, None]
            )
            run_start = run_stop + 1

    maximum = tl.max(maxima, 1)
    total = tl.sum(sums * tl.exp(maxima - maximum[:, None]), 1)
    store_partial(partials, pair * tl.num_programs(0) + split, maximum, total, G, GROUP)


@triton.jit(do_not_specialize=["num_segments", "max_chunks", "num_parts"])
def score_chunks_combine(
    table,
    logits,
    partials,
    scores,
    num_segments,
    max_chunks,
    num_parts,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Grid: blocks of chunks, heads, sequences."""
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    pair = sequence * tl.num_programs(1) + head
    _, _, num_chunks = segment_spans(table + sequence * num_segments * NUM_FIELDS, num_segments, SEGMENTS)
    maximum, total = combine_partials(partials, partials, pair * num_parts, num_parts, head, False, G, ROWS, PARTS)
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.arange(0, ROWS)
    rows = logits + (pair * G + g)[:, None] * max_chunks
    inside = (g < G)[:, None] & (chunk < num_chunks)[None, :]
    x = tl.load(rows + chunk[None, :], mask=inside, other=float("-inf"))
    tl.store(scores + pair * max_chunks + chunk, best_weight(x, maximum, total), mask=chunk < max_chunks)


def score_chunks(
    query: torch.Tensor,
    table: torch.Tensor,
    scaling: float,
    softcap: float,
    kind: int,
    scores: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """See the package."""
    check_contiguous(query=query, table=table, scores=scores, workspace=workspace)
    batch_size, num_heads, num_groups, head_dim = query.shape
    num_segments, max_chunks = table.shape[1], scores.shape[2]
    if max_chunks == 0:
        return
    check_query(query)
    check_workspace(workspace, score_chunks_workspace(batch_size, num_heads, num_groups, max_chunks))
    num_pairs = batch_size * num_heads
    num_parts = num_chunk_splits(num_pairs, max_chunks)
    num_partials = num_pairs * num_parts * 2 * num_groups
    partials, logits = workspace[:num_partials], workspace[num_partials:]
    stored = RowKind(kind).dtype(query.dtype).itemsize
    parts, options = _choose_parts(num_groups, head_dim, kind, stored, bool(softcap), num_segments)
    score_chunks_parts[(num_parts, num_heads, batch_size)](
        query, table, logits, partials, scaling, softcap, num_segments, max_chunks, **parts, **options
    )
    combine, options = _choose_combine(num_groups, num_parts, num_segments)
    score_chunks_combine[(triton.cdiv(max_chunks, SCORES_BLOCK), num_heads, batch_size)](
        table, logits, partials, scores, num_segments, max_chunks, num_parts, **combine, **options
    )


def _choose_parts(
    num_groups: int, head_dim: int, kind: int, itemsize: int, softcap: bool, num_segments: int
) -> tuple[dict[str, Any], dict[str, int]]:
    width = padded(head_dim)
    constants = {
        "G": num_groups,
        "D": head_dim,
        "KIND": int(kind),
        "SOFTCAP": softcap,
        "GROUP": GROUP,
        "WIDTH": width,
        "BLOCK": tile_rows(width * itemsize),
        "SEGMENTS": triton.next_power_of_2(max(1, num_segments)),
    }
    return constants, {"num_warps": 4, "num_stages": 4}


def _choose_combine(num_groups: int, num_parts: int, num_segments: int) -> tuple[dict[str, Any], dict[str, int]]:
    constants = {
        "G": num_groups,
        "ROWS": triton.next_power_of_2(num_groups),
        "PARTS": triton.next_power_of_2(num_parts),
        "BLOCK": SCORES_BLOCK,
        "SEGMENTS": triton.next_power_of_2(max(1, num_segments)),
    }
    return constants, {"num_warps": 4, "num_stages": 1}


def _configuration(
    dtype: str, kind: RowKind, num_groups: int, head_dim: int, *, softcap: bool = False
) -> Configuration:
    itemsize = 2 if kind == RowKind.MODEL else 1
    constants, options = _choose_parts(num_groups, head_dim, kind, itemsize, softcap, 4)
    return Configuration(
        name=f"parts {dtype} {kind.name.lower()} {num_groups} x {head_dim}{' softcap' if softcap else ''}",
        kernel=score_chunks_parts,
        signature={
            "query": f"*{dtype}",
            "table": "*i64",
            "logits": "*fp32",
            "partials": "*fp32",
            "scaling": "fp32",
            "softcap": "fp32",
            "num_segments": "i32",
            "max_chunks": "i32",
        },
        constexprs=constants,
        minimum_capability=89 if kind == FP8.value else 80,
        **options,
    )


def _combine_configuration(num_groups: int, num_parts: int) -> Configuration:
    constants, options = _choose_combine(num_groups, num_parts, 4)
    return Configuration(
        name=f"combine {num_groups} x {num_parts}",
        kernel=score_chunks_combine,
        signature={
            "table": "*i64",
            "logits": "*fp32",
            "partials": "*fp32",
            "scores": "*fp32",
            "num_segments": "i32",
            "max_chunks": "i32",
            "num_parts": "i32",
        },
        constexprs=constants,
        **options,
    )


CONFIGURATIONS = [
    *(_configuration(dtype, kind, 4, 128) for dtype in ("bf16", "fp16") for kind in RowKind),
    *(
        _configuration("bf16", kind, 4, head_dim)
        for kind in (RowKind.MODEL, RowKind.INT8)
        for head_dim in (32, 80, 256)
    ),
    _configuration("bf16", RowKind.MODEL, 16, 128),
    _configuration("bf16", RowKind.MODEL, 2, 256, softcap=True),
    _combine_configuration(4, 6),
    _combine_configuration(16, 128),
]
