"""The logic of top_chunks against the reference: any numbers, any alignment, any order of the threads."""

import ctypes
import math
import struct

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longshadow.engine.ops.top_chunks.reference import top_chunks
from tests.csrc.arrays import Array

ADVERSARIAL = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, math.inf, -math.inf, math.nan]
SINGLE = st.floats(width=32)
ROWS = st.one_of(
    st.lists(SINGLE, max_size=200),
    st.lists(st.sampled_from(ADVERSARIAL), max_size=300),
    st.lists(st.sampled_from([0.25, 0.5]), max_size=300),
    st.tuples(SINGLE, st.integers(0, 300)).map(lambda pair: [pair[0]] * pair[1]),
    st.lists(st.integers(0x3E000000, 0x3E000FFF), max_size=300).map(lambda row: [_float(bits) for bits in row]),
)
STRIDES = st.sampled_from(range(1, 16, 2))


def _float(bits: int) -> float:
    return float(struct.unpack("f", struct.pack("I", bits))[0])


@settings(max_examples=250, deadline=None)
@given(ROWS, st.integers(0, 320), st.integers(0, 20), st.integers(0, 3), st.booleans(), STRIDES)
@example([math.nan] * 100, 50, 0, 1, True, 3)
@example([1.0] * 257, 256, 0, 2, False, 5)
def test_as_the_reference(
    host_library: ctypes.CDLL, row: list[float], count: int, extra: int, shift: int, cached: bool, stride: int
) -> None:
    scores = Array(row, torch.float32, shift=shift)
    chosen = Array.poisoned(count + extra)
    host_library.host_top_chunks(scores.pointer, len(row), count, chosen.pointer, count + extra, int(cached), stride)
    expected = torch.empty(1, 1, count + extra, dtype=torch.int32)
    if row:
        top_chunks(scores.tensor.view(1, 1, -1), torch.tensor([count]), expected)
    else:
        expected.fill_(-1)
    assert chosen.numbers() == expected.flatten().tolist()


@settings(max_examples=300, deadline=None)
@given(st.one_of(SINGLE, st.sampled_from(ADVERSARIAL)), st.one_of(SINGLE, st.sampled_from(ADVERSARIAL)))
def test_keys_order_like_the_scores(host_library: ctypes.CDLL, first: float, second: float) -> None:
    host_library.host_order_key.restype = ctypes.c_uint32
    keys = [host_library.host_order_key(struct.unpack("I", struct.pack("f", score))[0]) for score in (first, second)]
    assert [key > 0 for key in keys] == [math.isfinite(first), math.isfinite(second)]
    if all(keys):
        assert (keys[0] < keys[1], keys[0] == keys[1]) == (first < second, first == second)
