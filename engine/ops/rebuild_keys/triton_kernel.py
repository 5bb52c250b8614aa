"""`rebuild_keys` in Triton: tensor cores over the tokens of several missing chunks at a time.

A program takes BLOCK_TOKENS missing tokens of one head. They are ascending, so that they seldom touch more than one
segment; the program goes over those they touch, each with its own rank and basis.

The columns of a head are worked on in three parts, which makes every rotary layout the same: the first elements of
the rotated pairs, the second ones, and the elements that are not rotated.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from longshadow.engine.ops.configuration import Configuration
from longshadow.engine.ops.rotary import RotaryStyle
from longshadow.engine.ops.tables import Field, RowKind
from longshadow.engine.ops.triton_functions import FIRST_CHUNK, FP8, MODEL, NUM_CHUNKS, NUM_FIELDS

COEFFICIENTS = tl.constexpr(int(Field.COEFFICIENTS))
COEFFICIENT_SCALES = tl.constexpr(int(Field.COEFFICIENT_SCALES))
RANK = tl.constexpr(int(Field.RANK))
BASIS = tl.constexpr(int(Field.BASIS))
MEAN = tl.constexpr(int(Field.MEAN))
COS = tl.constexpr(int(Field.COS))
SIN = tl.constexpr(int(Field.SIN))
NO_ROTATION = tl.constexpr(int(RotaryStyle.NONE))
INTERLEAVED = tl.constexpr(int(RotaryStyle.INTERLEAVED))
# e4m3 has an exponent bias of 7, fp16 of 15.
FP8_FACTOR = tl.constexpr(256.0)


@triton.jit
def _unpack(packed, KIND: tl.constexpr, dtype: tl.constexpr):
    """Stored elements in the model's dtype, exactly; those of fp8 divided by FP8_FACTOR.

    e4m3 is fp16 with a shorter exponent, so that it is read by shifting bits, on every device.
    """
    if KIND == FP8:
        bits = packed.to(tl.uint16)
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(dtype)
    else:
        return packed.to(dtype)


@triton.jit
def _rebuild(
    fields,
    rank,
    head,
    source,
    target,
    mine,
    key_slots,
    KIND: tl.constexpr,
    STYLE: tl.constexpr,
    ROTATION_FP32: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rebuilds those tokens `source` of a segment that are `mine`, into the rows `target` of the slots."""
    dtype: tl.constexpr = key_slots.dtype.element_ty
    coefficient_dtype: tl.constexpr = dtype if KIND == MODEL else (tl.uint8 if KIND == FP8 else tl.int8)
    rotation_dtype: tl.constexpr = tl.float32 if ROTATION_FP32 else dtype
    coefficients = tl.multiple_of(tl.load(fields + COEFFICIENTS).to(tl.pointer_type(coefficient_dtype)), 16)
    basis = tl.multiple_of(tl.load(fields + BASIS).to(tl.pointer_type(dtype)), 16)
    mean = tl.load(fields + MEAN).to(tl.pointer_type(dtype)) + head * HEAD_DIM
    pair = tl.arange(0, BLOCK_PAIRS)
    is_pair = pair < NUM_PAIRS
    first = 2 * pair if STYLE == INTERLEAVED else pair
    second = 2 * pair + 1 if STYLE == INTERLEAVED else pair + NUM_PAIRS
    rest = 2 * NUM_PAIRS + tl.arange(0, BLOCK_REST)
    is_rest = rest < HEAD_DIM
    keys_first = tl.zeros([BLOCK_TOKENS, BLOCK_PAIRS], tl.float32)
    keys_second = tl.zeros([BLOCK_TOKENS, BLOCK_PAIRS], tl.float32)
    keys_rest = tl.zeros([BLOCK_TOKENS, BLOCK_REST], tl.float32)
    rows = coefficients + source * rank
    basis += head.to(tl.int64) * rank * HEAD_DIM
    for start in range(0, rank, BLOCK_RANK):
        column = start + tl.arange(0, BLOCK_RANK)
        inside = column < rank
        packed = tl.load(rows[:, None] + column[None, :], mask=mine[:, None] & inside[None, :], other=0)
        factor = _unpack(packed, KIND, dtype)
        basis_rows = basis + column[:, None] * HEAD_DIM
        if STYLE != NO_ROTATION:
            in_pairs = inside[:, None] & is_pair[None, :]
            basis_first = tl.load(basis_rows + first[None, :], mask=in_pairs, other=0.0)
            keys_first = tl.dot(factor, basis_first, keys_first, input_precision="ieee")
            basis_second = tl.load(basis_rows + second[None, :], mask=in_pairs, other=0.0)
            keys_second = tl.dot(factor, basis_second, keys_second, input_precision="ieee")
        if 2 * NUM_PAIRS < HEAD_DIM:
            in_rest = inside[:, None] & is_rest[None, :]
            basis_rest = tl.load(basis_rows + rest[None, :], mask=in_rest, other=0.0)
            keys_rest = tl.dot(factor, basis_rest, keys_rest, input_precision="ieee")

    if KIND != MODEL:
        scales = tl.load(fields + COEFFICIENT_SCALES).to(tl.pointer_type(tl.float32))
        scale = tl.load(scales + source, mask=mine, other=0.0)[:, None]
        if KIND == FP8:
            scale *= FP8_FACTOR
        keys_first *= scale
        keys_second *= scale
        keys_rest *= scale
    slots = key_slots + target * HEAD_DIM
    if STYLE != NO_ROTATION:
        keys_first += tl.load(mean + first, mask=is_pair, other=0.0).to(tl.float32)[None, :]
        keys_second += tl.load(mean + second, mask=is_pair, other=0.0).to(tl.float32)[None, :]
        angle = source[:, None] * NUM_PAIRS + pair[None, :]
        in_pairs = mine[:, None] & is_pair[None, :]
        cos = tl.multiple_of(tl.load(fields + COS).to(tl.pointer_type(rotation_dtype)), 16)
        sin = tl.multiple_of(tl.load(fields + SIN).to(tl.pointer_type(rotation_dtype)), 16)
        cos = tl.load(cos + angle, mask=in_pairs, other=0.0).to(tl.float32)
        sin = tl.load(sin + angle, mask=in_pairs, other=0.0).to(tl.float32)
        turned_first = (keys_first * cos - keys_second * sin).to(dtype)
        turned_second = (keys_second * cos + keys_first * sin).to(dtype)
        if STYLE == INTERLEAVED:
            column = tl.arange(0, 2 * BLOCK_PAIRS)
            turned = tl.interleave(turned_first, turned_second)
            in_columns = mine[:, None] & (column < 2 * NUM_PAIRS)[None, :]
            tl.store(slots[:, None] + column[None, :], turned, mask=in_columns)
        else:
            tl.store(slots[:, None] + first[None, :], turned_first, mask=in_pairs)
            tl.store(slots[:, None] + second[None, :], turned_second, mask=in_pairs)
    if 2 * NUM_PAIRS < HEAD_DIM:
        keys_rest += tl.load(mean + rest, mask=is_rest, other=0.0).to(tl.float32)[None, :]
        tl.store(slots[:, None] + rest[None, :], keys_rest.to(dtype), mask=mine[:, None] & is_rest[None, :])


@triton.jit(do_not_specialize=["num_segments", "num_chosen", "num_slots"])
def rebuild_keys_kernel(
    table,
    chosen,
    slots,
    misses,
    num_misses,
    key_slots,
    num_segments,
    num_chosen,
    num_slots,
    KIND: tl.constexpr,
    STYLE: tl.constexpr,
    ROTATION_FP32: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
):
    """Grid: blocks of missing tokens, heads, sequences."""
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    row = sequence * tl.num_programs(1) + head
    num_tokens = tl.load(num_misses + row) * CHUNK_SIZE
    first_token = tl.program_id(0) * BLOCK_TOKENS
    if first_token >= num_tokens:
        return
    token = first_token + tl.arange(0, BLOCK_TOKENS)
    valid = token < num_tokens
    offset = token % CHUNK_SIZE
    place = row * num_chosen + tl.load(misses + row * num_chosen + token // CHUNK_SIZE, mask=valid, other=0)
    chunk = tl.load(chosen + place, mask=valid, other=0)
    target = (row * num_slots + tl.load(slots + place, mask=valid, other=0)) * CHUNK_SIZE + offset

    segments = table + sequence * num_segments * NUM_FIELDS
    number = tl.arange(0, BLOCK_SEGMENTS)
    exists = number < num_segments
    starts = tl.load(segments + number * NUM_FIELDS + FIRST_CHUNK, mask=exists, other=0)
    lengths = tl.load(segments + number * NUM_FIELDS + NUM_CHUNKS, mask=exists, other=0)
    # Past the block's end the first chunk stands for what is missing.
    lowest = tl.min(tl.where(valid, chunk, 0x7FFFFFFF), 0)
    highest = tl.max(tl.where(valid, chunk, 0), 0)
    first_segment = tl.max(tl.where((lengths > 0) & (starts <= lowest), number, 0), 0)
    last_segment = tl.max(tl.where((lengths > 0) & (starts <= highest), number, 0), 0)
    for segment in range(first_segment, last_segment + 1):
        fields = segments + segment * NUM_FIELDS
        local = chunk - tl.load(fields + FIRST_CHUNK)
        mine = valid & (local >= 0) & (local < tl.load(fields + NUM_CHUNKS))
        source = local * CHUNK_SIZE + offset
        rank = tl.load(fields + RANK).to(tl.int32)
        # Rows that begin at multiples of 16 elements are read 16 bytes at a time.
        if rank % 16 == 0:
            _rebuild(
                fields,
                rank // 16 * 16,
                head,
                source,
                target,
                mine,
                key_slots,
                KIND,
                STYLE,
                ROTATION_FP32,
                NUM_PAIRS,
                HEAD_DIM,
                BLOCK_TOKENS,
                BLOCK_RANK,
                BLOCK_PAIRS,
                BLOCK_REST,
            )
        else:
            _rebuild(
                fields,
                rank,
                head,
                source,
                target,
                mine,
                key_slots,
                KIND,
                STYLE,
                ROTATION_FP32,
                NUM_PAIRS,
                HEAD_DIM,
                BLOCK_TOKENS,
                BLOCK_RANK,
                BLOCK_PAIRS,
                BLOCK_REST,
            )


def rebuild_keys(
    table: torch.Tensor,
    chosen: torch.Tensor,
    slots: torch.Tensor,
    misses: torch.Tensor,
    num_misses: torch.Tensor,
    kind: int,
    rotary_style: int,
    rotary_dim: int,
    key_slots: torch.Tensor,
    rotation_fp32: bool = True,
) -> None:
    """See the package."""
    batch_size, num_heads, num_slots, chunk_size, head_dim = key_slots.shape
    constants, options = _choose(kind, rotary_style, rotary_dim, rotation_fp32, head_dim, chunk_size, table.shape[1])
    num_chosen = chosen.shape[2]
    grid = (triton.cdiv(num_chosen * chunk_size, constants["BLOCK_TOKENS"]), num_heads, batch_size)
    rebuild_keys_kernel[grid](
        table,
        chosen,
        slots,
        misses,
        num_misses,
        key_slots,
        table.shape[1],
        num_chosen,
        num_slots,
        **constants,
        **options,
    )


def _choose(
    kind: int,
    rotary_style: int,
    rotary_dim: int,
    rotation_fp32: bool,
    head_dim: int,
    chunk_size: int,
    max_segments: int,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and launch options of the kernel."""
    num_pairs = rotary_dim // 2 if rotary_style else 0
    num_rest = head_dim - 2 * num_pairs
    constants = {
        "KIND": int(kind),
        "STYLE": int(rotary_style),
        "ROTATION_FP32": rotation_fp32,
        "NUM_PAIRS": num_pairs,
        "HEAD_DIM": head_dim,
        "CHUNK_SIZE": chunk_size,
        "BLOCK_TOKENS": 64,
        "BLOCK_RANK": 32,
        # A matrix product has at least 16 columns.
        "BLOCK_PAIRS": max(16, triton.next_power_of_2(num_pairs)),
        "BLOCK_REST": max(16, triton.next_power_of_2(num_rest)),
        "BLOCK_SEGMENTS": triton.next_power_of_2(max_segments),
    }
    return constants, {"num_warps": 4 if head_dim <= 64 else 8, "num_stages": 3}


def _configuration(
    dtype: str, kind: RowKind, head_dim: int, *, style: RotaryStyle = RotaryStyle.HALF, rotary_dim: int | None = None
) -> Configuration:
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    constants, options = _choose(kind, style, rotary_dim, False, head_dim, 8, 16)
    integers = dict.fromkeys(("num_segments", "num_chosen", "num_slots"), "i32")
    lists = dict.fromkeys(("chosen", "slots", "misses", "num_misses"), "*i32")
    return Configuration(
        name=f"{dtype} {kind.name.lower()} {style.name.lower()} {rotary_dim} of {head_dim}",
        kernel=rebuild_keys_kernel,
        signature={"table": "*i64", **lists, "key_slots": f"*{dtype}", **integers},
        constexprs=constants,
        **options,
    )


CONFIGURATIONS = [
    *(_configuration(dtype, kind, 128) for dtype in ("bf16", "fp16") for kind in RowKind),
    _configuration("bf16", RowKind.INT8, 32),
    _configuration("bf16", RowKind.INT8, 80, rotary_dim=32),
    _configuration("bf16", RowKind.INT8, 256),
    _configuration("bf16", RowKind.INT8, 128, style=RotaryStyle.INTERLEAVED, rotary_dim=64),
    _configuration("bf16", RowKind.INT8, 128, style=RotaryStyle.NONE, rotary_dim=0),
]
