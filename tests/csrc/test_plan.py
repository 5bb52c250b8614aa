"""The logic of plan_chunks against the reference, over several steps and for any order of the threads."""

import ctypes
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.ops.plan_chunks.reference import plan_chunks
from tests.csrc.arrays import Array

STRIDES = st.sampled_from(range(1, 16, 2))


@settings(max_examples=50, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.integers(1, 70),
    st.integers(0, 40),
    st.integers(0, 100),
    st.integers(1, 9),
    st.booleans(),
    STRIDES,
)
def test_as_the_reference(
    host_library: ctypes.CDLL,
    number: random.Random,
    num_chosen: int,
    extra_slots: int,
    extra_chunks: int,
    chunk_size: int,
    apart: bool,
    stride: int,
) -> None:
    num_slots = num_chosen + extra_slots
    # Multiples of a power of two would all meet in one place of a bad hash table.
    factor = 2**16 if apart else 1
    held = Array([-1] * num_slots)
    used = Array([0] * num_slots)
    flags = Array([0] * (num_slots * chunk_size), torch.uint8)
    expected = [
        held.tensor.view(1, 1, -1).clone(),
        used.tensor.view(1, 1, -1).clone(),
        flags.tensor.view(1, 1, num_slots, chunk_size).clone(),
    ]
    for step in range(1, 5):
        wanted = number.sample(range(num_chosen + extra_chunks), number.choice([num_chosen, num_chosen // 2]))
        wanted = [chunk * factor for chunk in wanted] + [-1] * (num_chosen - len(wanted))
        number.shuffle(wanted)
        chosen = Array(wanted)
        slots, misses, num_misses = (Array.poisoned(length) for length in (num_chosen, num_chosen, 1))
        host_library.host_plan_chunks(
            *(array.pointer for array in (chosen, held, used, flags, slots, misses, num_misses)),
            *(num_chosen, num_slots, chunk_size, step, stride),
        )
        out = [torch.empty(1, 1, num_chosen, dtype=torch.int32) for _ in range(2)]
        count = torch.empty(1, 1, dtype=torch.int32)
        plan_chunks(chosen.tensor.view(1, 1, -1), *expected, torch.tensor([step]), *out, count)
        for array, tensor in zip((slots, misses, num_misses, held, used, flags), (*out, count, *expected), strict=True):
            assert array.numbers() == tensor.flatten().tolist()
        filled = torch.randint(2, flags.tensor.shape, generator=torch.Generator().manual_seed(step))
        flags.tensor.copy_(filled)
        expected[2].view(-1).copy_(filled)


def test_uses_from_before_the_first_step(host_library: ctypes.CDLL) -> None:
    held, used, flags = Array([5, 6, 7, 8]), Array([3, -2, 2**31 - 2, -(2**31)]), Array([1] * 4, torch.uint8)
    chosen, slots, misses, num_misses = Array([1, 7, 2]), *(Array.poisoned(length) for length in (3, 3, 1))
    host_library.host_plan_chunks(
        *(array.pointer for array in (chosen, held, used, flags, slots, misses, num_misses)), 3, 4, 1, 9, 1
    )
    assert slots.numbers() == [3, 2, 1] and misses.numbers() == [0, 2, -1] and num_misses.numbers() == [2]
    assert held.numbers() == [5, 2, 7, 1] and used.numbers() == [3, 9, 9, 9] and flags.numbers() == [1, 0, 1, 0]


@pytest.mark.parametrize(("num_chosen", "num_slots"), [(768, 1024), (3072, 9216), (16384, 16384)])
def test_the_promised_sizes_fit_into_shared_memory(host_library: ctypes.CDLL, num_chosen: int, num_slots: int) -> None:
    assert 0 < host_library.host_plan_bytes(num_chosen, num_slots) < 98 * 1024
