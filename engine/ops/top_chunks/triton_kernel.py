"""`top_chunks` in Triton: radix select, one program per row.

The bits of a score, made to order like the score, are taken eight at a time, the highest first. A histogram of those
eight bits, among the scores that share all higher bits with the last score to be chosen, gives the next eight bits of
that score. A pass over the row then writes the places of all larger scores and of the first ones that equal it.
"""

import torch
import triton
import triton.language as tl

from longshadow.engine.ops.checks import check_contiguous
from longshadow.engine.ops.configuration import Configuration

BLOCK = 4096
NUM_WARPS = 8
BITS = tl.constexpr(8)
BINS = tl.constexpr(256)


@triton.jit
def _load_keys(row, start, num_scores, BLOCK: tl.constexpr):
    """Unsigned numbers that order like the scores; 0, below all others, for infinite ones, NaN and places beyond."""
    place = start + tl.arange(0, BLOCK)
    bits = tl.load(row + place, mask=place < num_scores, other=float("inf")).to(tl.uint32, bitcast=True)
    keys = tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)
    keys = tl.where(bits == 0x80000000, bits, keys)  # -0 ties with 0
    return tl.where((bits & 0x7F800000) == 0x7F800000, 0, keys)


@triton.jit
def _count_digits(row, num_scores, prefix, SHIFT: tl.constexpr, IS_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """How often each value of the eight bits from SHIFT on occurs among the keys whose higher bits are `prefix`."""
    histogram = tl.zeros([BINS], dtype=tl.int32)
    for start in range(0, num_scores, BLOCK):
        keys = _load_keys(row, start, num_scores, BLOCK)
        counted = keys != 0
        if not IS_FIRST:
            counted = counted & ((keys >> (SHIFT + BITS)) == prefix)
        histogram += tl.histogram(((keys >> SHIFT) & (BINS - 1)).to(tl.int32), BINS, mask=counted)
    return histogram


@triton.jit(do_not_specialize=["num_heads", "num_scores", "capacity"])
def top_chunks_kernel(scores, counts, chosen, num_heads, num_scores, capacity, BLOCK: tl.constexpr):
    """Grid: rows, one of each head of each sequence."""
    pair = tl.program_id(0)
    row = scores + pair.to(tl.int64) * num_scores
    target = chosen + pair.to(tl.int64) * capacity
    needed = tl.minimum(tl.maximum(tl.load(counts + pair // num_heads), 0), capacity)

    bins = tl.arange(0, BINS)
    threshold = tl.zeros([], dtype=tl.uint32)
    for step in tl.static_range(4):
        histogram = _count_digits(row, num_scores, threshold, 24 - 8 * step, step == 0, BLOCK)
        if step == 0:
            needed = tl.minimum(needed, tl.sum(histogram))
        # The highest bin with `needed` keys in it and above.
        upwards = tl.cumsum(histogram, 0, reverse=True)
        digit = tl.sum((upwards >= needed).to(tl.int32)) - 1
        needed -= tl.sum(tl.where(bins > digit, histogram, 0))
        threshold = (threshold << BITS) | digit.to(tl.uint32)

    # Of the keys that equal the threshold the first `needed` are chosen; none are when nothing was needed at all, which
    # makes it the largest number.
    num_above = 0
    num_equal = 0
    for start in range(0, num_scores, BLOCK):
        keys = _load_keys(row, start, num_scores, BLOCK)
        above = (keys > threshold).to(tl.int32)
        equal = (keys == threshold).to(tl.int32)
        # Both are counted in one scan, in 16 bits each.
        packed = above | (equal << 16)
        before = tl.cumsum(packed, 0) - packed
        above_before = num_above + (before & 0xFFFF)
        equal_before = num_equal + (before >> 16)
        place = above_before + tl.minimum(equal_before, needed)
        taken = (above != 0) | ((equal != 0) & (equal_before < needed))
        tl.store(target + place, start + tl.arange(0, BLOCK), mask=taken)
        num_above += tl.sum(above)
        num_equal += tl.sum(equal)
    num_chosen = num_above + tl.minimum(num_equal, needed)
    for start in range(0, capacity, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(target + place, -1, mask=(place >= num_chosen) & (place < capacity))


def top_chunks(scores: torch.Tensor, counts: torch.Tensor, chosen: torch.Tensor) -> None:
    """See the package."""
    check_contiguous(scores=scores, counts=counts, chosen=chosen)
    batch_size, num_heads, num_scores = scores.shape
    top_chunks_kernel[batch_size * num_heads,](
        scores,
        counts,
        chosen,
        num_heads,
        num_scores,
        chosen.shape[2],
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


CONFIGURATIONS = [
    Configuration(
        name="any",
        kernel=top_chunks_kernel,
        signature={
            "scores": "*fp32",
            "counts": "*i32",
            "chosen": "*i32",
            "num_heads": "i32",
            "num_scores": "i32",
            "capacity": "i32",
        },
        constexprs={"BLOCK": BLOCK},
        num_warps=NUM_WARPS,
        num_stages=3,
    )
]
