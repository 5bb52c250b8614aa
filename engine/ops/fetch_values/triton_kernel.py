"""`fetch_values` in Triton: one launch for all sequences and heads, 16 bytes per thread and load.

A program takes BLOCK_PLACES places of one head and looks up each one's segment, so that segments in several places
of host memory are read at once.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from longshadow.engine.ops.configuration import Configuration
from longshadow.engine.ops.tables import ALIGNMENT, Field, RowKind
from longshadow.engine.ops.triton_functions import FIRST_CHUNK, INT8, NUM_CHUNKS, NUM_FIELDS

VALUES = tl.constexpr(int(Field.VALUES))
VALUE_SCALES = tl.constexpr(int(Field.VALUE_SCALES))
# Bytes of values that a program moves: each of its 128 threads then has several loads in flight.
PROGRAM_BYTES = 8192


@triton.jit(do_not_specialize=["num_segments", "num_slots", "num_places"])
def fetch_values_kernel(
    table,
    slot_chunks,
    places,
    has_values,
    value_slots,
    num_segments,
    num_slots,
    num_places,
    KIND: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
):
    """Grid: blocks of places, heads, sequences."""
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    row = sequence * tl.num_programs(1) + head
    number = tl.program_id(0) * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)
    place = tl.load(places + row * num_places + number, mask=number < num_places, other=-1)
    present = has_values + row * num_slots * CHUNK_SIZE + place
    missing = (place >= 0) & (tl.load(present, mask=place >= 0, other=1) == 0)
    if tl.max(missing.to(tl.int32), 0) == 0:
        return
    # All threads have read before one of them writes.
    tl.debug_barrier()
    tl.store(present, tl.full([BLOCK_PLACES], 1, tl.uint8), mask=missing)

    chunk = tl.load(slot_chunks + row * num_slots + place // CHUNK_SIZE, mask=missing, other=0)
    segments = table + sequence * num_segments * NUM_FIELDS
    column = tl.arange(0, BLOCK_SEGMENTS)
    lengths = tl.load(segments + column * NUM_FIELDS + NUM_CHUNKS, mask=column < num_segments, other=0)
    starts = tl.load(segments + column * NUM_FIELDS + FIRST_CHUNK, mask=column < num_segments, other=0)
    begun = (lengths > 0)[None, :] & (starts[None, :] <= chunk[:, None])
    fields = segments + tl.max(tl.where(begun, column[None, :], 0), 1) * NUM_FIELDS
    length = tl.load(fields + NUM_CHUNKS, mask=missing, other=0)
    local = chunk - tl.load(fields + FIRST_CHUNK, mask=missing, other=0)
    token = (head * length + local) * CHUNK_SIZE + place % CHUNK_SIZE

    dtype: tl.constexpr = value_slots.dtype.element_ty
    stored: tl.constexpr = tl.int8 if KIND == INT8 else dtype
    element_size: tl.constexpr = stored.primitive_bitwidth // 8
    address = tl.load(fields + VALUES, mask=missing, other=0) + token * (HEAD_DIM * element_size)
    source = tl.multiple_of(address[:, None].to(tl.pointer_type(stored)), [16, 16])
    element = tl.arange(0, BLOCK_DIM)
    inside = missing[:, None] & (element < HEAD_DIM)[None, :]
    values = tl.load(source + element[None, :], mask=inside, other=0)
    if KIND == INT8:
        scales = tl.load(fields + VALUE_SCALES, mask=missing, other=0).to(tl.pointer_type(tl.float32))
        values = values.to(tl.float32) * tl.load(scales + token, mask=missing, other=0.0)[:, None]
    target = value_slots + (row * num_slots * CHUNK_SIZE + place)[:, None] * HEAD_DIM
    tl.store(target + element[None, :], values.to(dtype), mask=inside)


def fetch_values(
    table: torch.Tensor,
    slot_chunks: torch.Tensor,
    places: torch.Tensor,
    kind: int,
    has_values: torch.Tensor,
    value_slots: torch.Tensor,
) -> None:
    """See the package."""
    batch_size, num_heads, num_slots, chunk_size, head_dim = value_slots.shape
    num_places = places.shape[2]
    constants, options = _choose(kind, head_dim, chunk_size, table.shape[1], value_slots.element_size())
    fetch_values_kernel[triton.cdiv(num_places, constants["BLOCK_PLACES"]), num_heads, batch_size](
        table,
        slot_chunks,
        places,
        has_values,
        value_slots,
        table.shape[1],
        num_slots,
        num_places,
        **constants,
        **options,
    )


def _choose(
    kind: int, head_dim: int, chunk_size: int, max_segments: int, element_size: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and launch options of the kernel."""
    stored_size = 1 if kind == RowKind.INT8 else element_size
    if head_dim * stored_size % ALIGNMENT:
        raise ValueError(f"value head_dim must be a multiple of {ALIGNMENT // stored_size}, got {head_dim}")
    width = triton.next_power_of_2(head_dim)
    constants = {
        "KIND": int(kind),
        "HEAD_DIM": head_dim,
        "CHUNK_SIZE": chunk_size,
        "BLOCK_PLACES": max(16, PROGRAM_BYTES // (width * element_size)),
        "BLOCK_DIM": width,
        "BLOCK_SEGMENTS": triton.next_power_of_2(max_segments),
    }
    return constants, {"num_warps": 4, "num_stages": 1}


def _configuration(dtype: str, kind: RowKind, head_dim: int) -> Configuration:
    constants, options = _choose(kind, head_dim, 8, 16, 2)
    pointers = {"table": "*i64", "slot_chunks": "*i32", "places": "*i32", "has_values": "*u8"}
    integers = dict.fromkeys(("num_segments", "num_slots", "num_places"), "i32")
    return Configuration(
        name=f"{dtype} {kind.name.lower()} {head_dim}",
        kernel=fetch_values_kernel,
        signature={**pointers, "value_slots": f"*{dtype}", **integers},
        constexprs=constants,
        **options,
    )


CONFIGURATIONS = [
    *(_configuration(dtype, kind, 128) for dtype in ("bf16", "fp16") for kind in (RowKind.MODEL, RowKind.INT8)),
    *(_configuration("bf16", RowKind.INT8, head_dim) for head_dim in (32, 80, 256)),
]
