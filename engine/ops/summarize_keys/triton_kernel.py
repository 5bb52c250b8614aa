"""`summarize_keys` in Triton: one pass over the keys, tensor cores over what it leaves, and the sum of the parts.

1. `summarize_blocks` reads a block of chunks of one head: landmarks and cosines, the un-rotated keys, and their sum.
2. `gram_splits` multiplies the un-rotated keys of a split of the tokens, half-precision products exactly, with fp32
   sums; only tiles on and above the diagonal. Tensor cores add to a large sum with less than fp32's precision, so
   the sums of RUN_TOKENS tokens are added up apart.
3. `sum_splits` adds the splits in their order, weighs the sum, and writes both triangles.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from longshadow.engine.ops.configuration import Configuration
from longshadow.engine.ops.rotary import RotaryStyle
from longshadow.engine.ops.summarize_keys.tiling import block_chunks, num_blocks, num_splits, padded

NO_ROTATION = tl.constexpr(int(RotaryStyle.NONE))
INTERLEAVED = tl.constexpr(int(RotaryStyle.INTERLEAVED))
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# Strides are counted in so many elements, so that rows are known to begin at multiples of 16 bytes.
STRIDE_UNIT = tl.constexpr(16)
RUN_TOKENS = 1024
SUM_BLOCK = 32


@triton.jit
def _load_keys(rows, columns, inside):
    """Columns of a block's keys, [CHUNKS, TOKENS, COLUMNS], fp32, 0 where not inside."""
    return tl.load(rows[:, :, None] + columns[None, None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_plain(plain, sums, rows, columns, inside, valid, keys):
    """Columns of un-rotated keys [CHUNKS, TOKENS, COLUMNS], and the sum of what is stored in the valid ones."""
    rounded = keys.to(plain.dtype.element_ty)
    tl.store(plain + rows[:, :, None] + columns[None, None, :], rounded, mask=inside)
    tl.store(sums + columns, tl.sum(tl.sum(rounded.to(tl.float32), 0), 0), mask=valid)


@triton.jit(do_not_specialize=["num_chunks", "head_stride", "token_stride"])
def summarize_blocks(
    keys,
    cos,
    sin,
    plain,
    landmarks,
    min_cosine,
    block_sums,
    num_chunks,
    head_stride,
    token_stride,
    STYLE: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """Grid: heads, blocks of chunks: heads of the same tokens run together and share the angles in the cache."""
    head, num_heads = tl.program_id(0), tl.num_programs(0)
    block = tl.program_id(1)
    chunk = block * CHUNKS + tl.arange(0, CHUNKS)
    offset = tl.arange(0, TOKENS)
    exists = chunk < num_chunks
    inside = exists[:, None] & (offset < CHUNK_SIZE)[None, :]
    token = chunk.to(tl.int64)[:, None] * CHUNK_SIZE + offset[None, :]
    width = num_heads * HEAD_DIM
    rows = keys + (head * head_stride + token * token_stride) * STRIDE_UNIT
    landmark_rows = landmarks + (head.to(tl.int64) * num_chunks + chunk)[:, None] * HEAD_DIM
    plain_rows = token * width + head * HEAD_DIM
    sums = block_sums + block.to(tl.int64) * width + head * HEAD_DIM
    dots = tl.zeros([CHUNKS, TOKENS], tl.float32)
    squares = tl.zeros([CHUNKS, TOKENS], tl.float32)
    mean_squares = tl.zeros([CHUNKS], tl.float32)
    if STYLE != NO_ROTATION:
        pair = tl.arange(0, PAIRS)
        is_pair = pair < NUM_PAIRS
        in_pairs = inside[:, :, None] & is_pair[None, None, :]
        first = 2 * pair if STYLE == INTERLEAVED else pair
        second = 2 * pair + 1 if STYLE == INTERLEAVED else pair + NUM_PAIRS
        a = _load_keys(rows, first, in_pairs)
        b = _load_keys(rows, second, in_pairs)
        mean_a, mean_b = tl.sum(a, 1) / CHUNK_SIZE, tl.sum(b, 1) / CHUNK_SIZE
        dots += tl.sum(a * mean_a[:, None, :] + b * mean_b[:, None, :], 2)
        squares += tl.sum(a * a + b * b, 2)
        mean_squares += tl.sum(mean_a * mean_a + mean_b * mean_b, 1)
        pair_of_chunk = exists[:, None] & is_pair[None, :]
        tl.store(landmark_rows + first[None, :], mean_a, mask=pair_of_chunk)
        tl.store(landmark_rows + second[None, :], mean_b, mask=pair_of_chunk)
        angle = token[:, :, None] * NUM_PAIRS + pair[None, None, :]
        c = tl.load(cos + angle, mask=in_pairs, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=in_pairs, other=0.0).to(tl.float32)
        norm = c * c + s * s
        c, s = c / norm, s / norm
        _store_plain(plain, sums, plain_rows, first, in_pairs, is_pair, a * c + b * s)
        _store_plain(plain, sums, plain_rows, second, in_pairs, is_pair, b * c - a * s)
    if 2 * NUM_PAIRS < HEAD_DIM:
        rest = 2 * NUM_PAIRS + tl.arange(0, REST)
        is_rest = rest < HEAD_DIM
        in_rest = inside[:, :, None] & is_rest[None, None, :]
        x = _load_keys(rows, rest, in_rest)
        mean_x = tl.sum(x, 1) / CHUNK_SIZE
        dots += tl.sum(x * mean_x[:, None, :], 2)
        squares += tl.sum(x * x, 2)
        mean_squares += tl.sum(mean_x * mean_x, 1)
        tl.store(landmark_rows + rest[None, :], mean_x, mask=exists[:, None] & is_rest[None, :])
        _store_plain(plain, sums, plain_rows, rest, in_rest, is_rest, x)
    norms = tl.sqrt(squares) * tl.sqrt(mean_squares)[:, None]
    cosines = tl.where(inside, dots / tl.maximum(norms, TINY), float("inf"))
    tl.store(min_cosine + head.to(tl.int64) * num_chunks + chunk, tl.min(cosines, 1), mask=exists)


@triton.jit(do_not_specialize=["num_tokens", "split_tokens"])
def gram_splits(
    plain,
    partials,
    num_tokens,
    split_tokens,
    WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid: rows and columns of tiles, splits."""
    if tl.program_id(0) > tl.program_id(1):
        return
    split = tl.program_id(2)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    start = split * split_tokens
    stop = tl.minimum(start + split_tokens, num_tokens)
    total = tl.zeros([TILE, TILE], tl.float32)
    for run_start in range(start, stop, RUN):
        run_stop = tl.minimum(run_start + RUN, stop)
        run = tl.zeros([TILE, TILE], tl.float32)
        for first in range(run_start, run_stop, TOKENS):
            token = first + tl.arange(0, TOKENS)
            rows = plain + token.to(tl.int64)[:, None] * WIDTH
            inside = (token < run_stop)[:, None]
            left = tl.load(rows + row[None, :], mask=inside & (row < WIDTH)[None, :], other=0.0)
            right = tl.load(rows + column[None, :], mask=inside & (column < WIDTH)[None, :], other=0.0)
            run = tl.dot(tl.trans(left), right, run, input_precision="ieee")
        total += run
    place = (split * WIDTH + row).to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(partials + place, total, mask=(row < WIDTH)[:, None] & (column < WIDTH)[None, :])


@triton.jit(do_not_specialize=["splits", "blocks"])
def sum_splits(
    partials,
    block_sums,
    weights,
    gram,
    key_sum,
    splits,
    blocks,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: rows and columns of tiles; those on the diagonal add up the keys of their columns, too."""
    if tl.program_id(0) > tl.program_id(1):
        return
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < WIDTH)[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    total = tl.zeros([TILE, TILE], tl.float32)
    partial = partials + place
    for _ in range(splits):
        total += tl.load(partial, mask=inside, other=0.0)
        partial += WIDTH * WIDTH
    if WEIGHTED:
        row_weights = tl.load(weights + row, mask=row < WIDTH, other=0.0)
        column_weights = tl.load(weights + column, mask=column < WIDTH, other=0.0)
        total *= row_weights[:, None] * column_weights[None, :]
    total += tl.load(gram + place, mask=inside, other=0.0)
    if tl.program_id(0) < tl.program_id(1):
        tl.store(gram + place, total, mask=inside)
        mirrored = column[:, None] * WIDTH + row[None, :]
        tl.store(gram + mirrored, tl.trans(total), mask=(column < WIDTH)[:, None] & (row < WIDTH)[None, :])
    else:
        symmetric = tl.where(row[:, None] <= column[None, :], total, tl.trans(total))
        tl.store(gram + place, symmetric, mask=inside)
        keys = tl.zeros([ROWS, TILE], tl.float32)
        for first in range(0, blocks, ROWS):
            block = first + tl.arange(0, ROWS)
            mask = (block < blocks)[:, None] & (column < WIDTH)[None, :]
            keys += tl.load(block_sums + block.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        added = tl.sum(keys, 0)
        if WEIGHTED:
            added *= column_weights
        tl.store(
            key_sum + column, tl.load(key_sum + column, mask=column < WIDTH, other=0.0) + added, mask=column < WIDTH
        )


def summarize_keys(
    keys: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotary_style: int,
    rotary_dim: int,
    chunk_size: int,
    weights: torch.Tensor | None,
    plain: torch.Tensor,
    landmarks: torch.Tensor,
    min_cosine: torch.Tensor,
    gram: torch.Tensor,
    key_sum: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """See the package."""
    num_heads, num_tokens, head_dim = keys.shape
    head_stride, token_stride, element_stride = keys.stride()
    unit = STRIDE_UNIT.value
    if element_stride != 1 or head_stride % unit or token_stride % unit:
        raise ValueError(f"keys must begin at multiples of {unit} elements, which follow each other: {keys.stride()}")
    width, splits = num_heads * head_dim, num_splits(num_tokens)
    blocks = num_blocks(num_tokens, head_dim, chunk_size)
    partials, block_sums = workspace[: splits * width**2], workspace[splits * width**2 :]
    constants, options = _choose_blocks(rotary_style, rotary_dim, head_dim, chunk_size)
    summarize_blocks[num_heads, blocks](
        keys,
        cos,
        sin,
        plain,
        landmarks,
        min_cosine,
        block_sums,
        num_tokens // chunk_size,
        head_stride // unit,
        token_stride // unit,
        **constants,
        **options,
    )
    constants, options = _choose_splits(width, plain.element_size())
    tiles = triton.cdiv(width, constants["TILE"])
    split_tokens = triton.cdiv(num_tokens, splits * constants["TOKENS"]) * constants["TOKENS"]
    gram_splits[tiles, tiles, splits](plain, partials, num_tokens, split_tokens, **constants, **options)
    tiles = triton.cdiv(width, SUM_BLOCK)
    sum_splits[tiles, tiles](
        partials, block_sums, weights, gram, key_sum, splits, blocks, **_choose_sum(width, weights is not None)
    )


def _choose_blocks(
    rotary_style: int, rotary_dim: int, head_dim: int, chunk_size: int
) -> tuple[dict[str, Any], dict[str, int]]:
    num_pairs = rotary_dim // 2 if rotary_style else 0
    constants = {
        "STYLE": int(rotary_style),
        "NUM_PAIRS": num_pairs,
        "HEAD_DIM": head_dim,
        "CHUNK_SIZE": chunk_size,
        "CHUNKS": block_chunks(head_dim, chunk_size),
        "TOKENS": padded(chunk_size),
        "PAIRS": padded(max(1, num_pairs)),
        "REST": padded(max(1, head_dim - 2 * num_pairs)),
    }
    elements = constants["CHUNKS"] * constants["TOKENS"] * padded(head_dim)
    return constants, {"num_warps": 8 if elements <= 8192 else 16, "num_stages": 1}


def _choose_splits(width: int, element_size: int) -> tuple[dict[str, Any], dict[str, int]]:
    constants = {
        "WIDTH": width,
        "RUN": RUN_TOKENS,
        "TILE": 128 if width > 256 and element_size < 4 else 64,
        # Three stages of two operands fit into 96 KiB of shared memory.
        "TOKENS": 128 // element_size,
    }
    return constants, {"num_warps": 8 if constants["TILE"] == 128 else 4, "num_stages": 3}


def _choose_sum(width: int, weighted: bool) -> dict[str, Any]:
    return {"WEIGHTED": weighted, "WIDTH": width, "TILE": SUM_BLOCK, "ROWS": 64}


def _block_configuration(
    dtype: str, head_dim: int, *, style: RotaryStyle = RotaryStyle.HALF, rotary_dim: int | None = None, angles: str
) -> Configuration:
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    constants, options = _choose_blocks(style, rotary_dim, head_dim, 8)
    pointers = {"keys": f"*{dtype}", "cos": f"*{angles}", "sin": f"*{angles}", "plain": f"*{dtype}"}
    results = dict.fromkeys(("landmarks", "min_cosine", "block_sums"), "*fp32")
    integers = dict.fromkeys(("num_chunks", "head_stride", "token_stride"), "i32")
    return Configuration(
        name=f"blocks {dtype} {style.name.lower()} {rotary_dim} of {head_dim}, {angles} angles",
        kernel=summarize_blocks,
        signature={**pointers, **results, **integers},
        constexprs=constants,
        **options,
    )


def _split_configuration(dtype: str, width: int) -> Configuration:
    constants, options = _choose_splits(width, 2)
    return Configuration(
        name=f"splits {dtype} {width}",
        kernel=gram_splits,
        signature={"plain": f"*{dtype}", "partials": "*fp32", "num_tokens": "i32", "split_tokens": "i32"},
        constexprs=constants,
        **options,
    )


def _sum_configuration(width: int, weighted: bool) -> Configuration:
    pointers = dict.fromkeys(("partials", "block_sums", "weights", "gram", "key_sum"), "*fp32")
    return Configuration(
        name=f"sum {width}{' weighted' if weighted else ''}",
        kernel=sum_splits,
        signature={**pointers, "splits": "i32", "blocks": "i32"},
        constexprs=_choose_sum(width, weighted),
        num_warps=4,
        num_stages=1,
    )


CONFIGURATIONS = [
    _split_configuration("bf16", 1024),
    *(_block_configuration(dtype, 128, angles=dtype) for dtype in ("bf16", "fp16")),
    _block_configuration("bf16", 128, angles="fp32"),
    _block_configuration("bf16", 32, angles="bf16"),
    _block_configuration("bf16", 80, rotary_dim=32, angles="bf16"),
    _block_configuration("bf16", 256, angles="bf16"),
    _block_configuration("bf16", 128, style=RotaryStyle.INTERLEAVED, rotary_dim=64, angles="bf16"),
    _split_configuration("fp16", 1024),
    _split_configuration("bf16", 192),
    _sum_configuration(1024, False),
    _sum_configuration(1024, True),
]
