"""The logic of fetch_values: which values are read from where, and that int8 ones come as the reference has them."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.ops.tables import Field, RowKind

SLOT_TYPES = {torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}


def test_the_table_is_laid_out_as_in_python(host_library: ctypes.CDLL) -> None:
    layout = (ctypes.c_int32 * 7)()
    host_library.host_table_layout(layout)
    fields = (len(Field), Field.NUM_CHUNKS, Field.FIRST_CHUNK, Field.VALUES, Field.VALUE_SCALES)
    assert list(layout) == [*fields, RowKind.MODEL, RowKind.INT8]


@pytest.mark.parametrize("dtype", SLOT_TYPES)
@pytest.mark.parametrize("kind", [RowKind.MODEL, RowKind.INT8])
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=3),
    num_heads=st.integers(1, 3),
    chunk_size=st.integers(1, 9),
    head_dim=st.sampled_from([32, 80, 96, 256]),
    seed=st.integers(0, 1000),
)
def test_missing_values_come_and_nothing_else(
    host_library: ctypes.CDLL,
    dtype: torch.dtype,
    kind: RowKind,
    sizes: list[list[int]],
    num_heads: int,
    chunk_size: int,
    head_dim: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    num_slots, num_places, num_segments = 6, 11, 4
    table = torch.zeros(len(sizes), num_segments, len(Field), dtype=torch.int64)
    held, expected = [], []
    for sequence, lengths in enumerate(sizes):
        values = []
        for position, length in enumerate(lengths):
            shape = (num_heads, length, chunk_size)
            if kind is RowKind.INT8:
                rows = torch.randint(-127, 128, (*shape, head_dim), generator=generator, dtype=torch.int8)
                scales = torch.rand(shape, generator=generator) / 100
                values.append((rows.float() * scales.unsqueeze(-1)).to(dtype))
            else:
                rows = torch.randn(*shape, head_dim, generator=generator).to(dtype)
                scales = torch.empty(0)
                values.append(rows)
            held += [rows, scales]
            row = table[sequence, position]
            row[Field.NUM_CHUNKS], row[Field.FIRST_CHUNK] = length, sum(lengths[:position])
            row[Field.VALUES], row[Field.VALUE_SCALES] = rows.data_ptr(), scales.data_ptr()
        none = torch.zeros(num_heads, 0, chunk_size, head_dim, dtype=dtype)
        expected.append(torch.cat([none, *values], 1))

    slot_chunks = torch.stack([integers(-1, max(1, sum(lengths)), num_heads, num_slots) for lengths in sizes])
    for sequence, lengths in enumerate(sizes):
        if not lengths:
            slot_chunks[sequence] = -1
    places = integers(-1, num_slots * chunk_size, len(sizes), num_heads, num_places)
    has_values = integers(0, 2, len(sizes), num_heads, num_slots, chunk_size).to(torch.uint8)
    value_slots = torch.full((*has_values.shape, head_dim), -7.0, dtype=dtype)
    old_flags, old_values = has_values.clone(), value_slots.clone()

    host_library.host_fetch_values(
        *(ctypes.c_void_p(x.data_ptr()) for x in (table, slot_chunks, places, has_values, value_slots)),
        *(len(sizes), num_segments, num_heads, num_slots, chunk_size, num_places, head_dim, int(kind)),
        SLOT_TYPES[dtype],
    )
    for sequence, head, position in torch.ones_like(places).nonzero().tolist():
        place = int(places[sequence, head, position])
        slot, offset = divmod(place, chunk_size)
        if place >= 0 and slot_chunks[sequence, head, slot] >= 0 and not old_flags[sequence, head, slot, offset]:
            old_flags[sequence, head, slot, offset] = 1
            chunk = int(slot_chunks[sequence, head, slot])
            old_values[sequence, head, slot, offset] = expected[sequence][head, chunk, offset]
    assert torch.equal(has_values, old_flags)
    assert torch.equal(value_slots, old_values)
