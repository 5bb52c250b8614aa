"""Device functions that the scoring and attention kernels share, and the tables' columns as Triton knows them.

Logits of a program are held as [GROUP, BLOCK]: the query heads that share a KV head, padded to the 16 rows that a
matrix product takes, times the chunks or tokens of a tile.
"""

import triton
import triton.language as tl

from longshadow.engine.ops.checks import MAXIMUM_GROUPS
from longshadow.engine.ops.tables import Field, RegionField, RowKind

NUM_FIELDS = tl.constexpr(len(Field))
NUM_CHUNKS = tl.constexpr(int(Field.NUM_CHUNKS))
FIRST_CHUNK = tl.constexpr(int(Field.FIRST_CHUNK))
LANDMARKS = tl.constexpr(int(Field.LANDMARKS))
LANDMARK_SCALES = tl.constexpr(int(Field.LANDMARK_SCALES))
EXACT_CHUNKS = tl.constexpr(int(Field.EXACT_CHUNKS))
NUM_EXACT = tl.constexpr(int(Field.NUM_EXACT))

NUM_REGION_FIELDS = tl.constexpr(len(RegionField))
REGION_KEYS = tl.constexpr(int(RegionField.KEYS))
REGION_VALUES = tl.constexpr(int(RegionField.VALUES))
REGION_KEY_HEAD_STRIDE = tl.constexpr(int(RegionField.KEY_HEAD_STRIDE))
REGION_VALUE_HEAD_STRIDE = tl.constexpr(int(RegionField.VALUE_HEAD_STRIDE))
REGION_LENGTH = tl.constexpr(int(RegionField.LENGTH))

MODEL = tl.constexpr(int(RowKind.MODEL))
INT8 = tl.constexpr(int(RowKind.INT8))
FP8 = tl.constexpr(int(RowKind.FP8))

# Rows of a matrix product.
GROUP = MAXIMUM_GROUPS
# Where running maxima begin. Unlike -inf it may be subtracted from -inf; no logit is as low.
FLOOR = tl.constexpr(-1e30)
# A stage of the pipeline reads so many bytes at most. Two or three in flight per program, two programs or more on a
# multiprocessor, outlast the latency of device memory (4.8 TB/s x 0.8 us over 132 multiprocessors are 29 KB each).
STAGE_BYTES = 16384
# More rows take more registers than they win: programs with fewer run beside each other.
MAXIMUM_ROWS = 64


def padded(width: int) -> int:
    """The power of two that a row of `width` elements is loaded as; a matrix product sums over 16 or more."""
    return max(16, 1 << (width - 1).bit_length())


def tile_rows(row_bytes: int, *, minimum: int = 16) -> int:
    """Rows of a tile, a power of two."""
    return min(MAXIMUM_ROWS, max(minimum, 1 << ((STAGE_BYTES // row_bytes).bit_length() - 1)))


@triton.jit
def pointer_to(address, element: tl.constexpr):
    """An address of the tables as a pointer, which allows loads of 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(element)), 16)


@triton.jit
def load_query(query, pair, G: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """The query heads of a (sequence, KV head) pair, [GROUP, WIDTH], 0 beyond the G heads of D elements."""
    g = tl.arange(0, GROUP)
    d = tl.arange(0, WIDTH)
    rows = query + (pair * G + g)[:, None] * D
    return tl.load(rows + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_rows(pointer, rows, valid, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of D elements by number, [BLOCK, WIDTH], 0 beyond them and where not `valid`."""
    d = tl.arange(0, WIDTH)
    return tl.load(pointer + rows[:, None] * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def cap_logits(x, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap), the logits themselves without SOFTCAP."""
    if SOFTCAP:
        y = x / softcap
        square = y * y
        # 1 - exp(-2 |y|) loses its digits near 0; there the series' next term is below fp32's precision.
        series = y * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        decay = tl.exp(-2 * tl.abs(y))
        ratio = (1 - decay) / (1 + decay)
        x = softcap * tl.where(tl.abs(y) < 0.3, series, tl.where(y < 0, -ratio, ratio))
    return x


@triton.jit
def store_partial(partials, part, maximum, total, G: tl.constexpr, GROUP: tl.constexpr):
    """Stores a part's maximum of the logits and its sum of exp(logit - maximum), [GROUP] each."""
    g = tl.arange(0, GROUP)
    tl.store(partials + part * 2 * G + g, maximum, mask=g < G)
    tl.store(partials + part * 2 * G + G + g, total, mask=g < G)


@triton.jit
def combine_partials(
    partials, sinks, first_part, num_parts, head, HAS_SINKS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr
):  # fmt: skip
    """Maximum and sum of exp(logit - maximum), [ROWS] each, over all parts and the sink."""
    part = tl.arange(0, PARTS)
    g = tl.arange(0, ROWS)
    valid = (part < num_parts)[:, None] & (g < G)[None, :]
    at = partials + (first_part + part)[:, None] * 2 * G + g[None, :]
    maxima = tl.load(at, mask=valid, other=FLOOR)
    totals = tl.load(at + G, mask=valid, other=0.0)
    maximum = tl.max(maxima, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head * G + g, mask=g < G, other=FLOOR).to(tl.float32)
        maximum = tl.maximum(maximum, sink)
        return maximum, tl.sum(totals * tl.exp(maxima - maximum[None, :]), 0) + tl.exp(sink - maximum)
    else:
        return maximum, tl.sum(totals * tl.exp(maxima - maximum[None, :]), 0)


@triton.jit
def best_weight(logits, maximum, total):
    """The largest softmax weight in any query head, [BLOCK], of logits [ROWS, BLOCK]; -inf where these are -inf."""
    # A sum of exp(logit - maximum) is 1 or more unless there is nothing to sum.
    weights = tl.exp(logits - maximum[:, None]) / tl.maximum(total, 1.0)[:, None]
    return tl.where(tl.max(logits, 0) == float("-inf"), float("-inf"), tl.max(weights, 0))


@triton.jit
def region_spans(regions, num_regions, REGIONS: tl.constexpr):
    """Where each region begins and ends when they are laid one after the other, in tokens."""
    r = tl.arange(0, REGIONS)
    lengths = tl.load(regions + r * NUM_REGION_FIELDS + REGION_LENGTH, mask=r < num_regions, other=0).to(tl.int32)
    stops = tl.cumsum(lengths, 0)
    return stops - lengths, stops
