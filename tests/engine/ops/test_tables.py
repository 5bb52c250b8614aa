"""Tables of addresses, and what is refused because operators could not read it."""

from typing import Any

import pytest
import torch

from longshadow.engine.ops.tables import (
    Field,
    RegionField,
    RowKind,
    SegmentTable,
    read_packed,
    read_region,
    read_rows,
    tensor_at,
)
from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.rope import RotaryLayout
from longshadow.engine.shadowkv.segment import Segment, compress
from tests.engine.ops.batches import random_batch, unpacked

HALF = RotaryLayout(style="half", rotary_dim=16)


def empty_table(device: torch.device, **changes: Any) -> SegmentTable:
    arguments: dict[str, Any] = dict(
        batch_size=1,
        max_segments=2,
        factors=RowKind.MODEL,
        values=RowKind.MODEL,
        dtype=torch.float32,
        device=device,
    )
    return SegmentTable(**(arguments | changes))


def segment_of(device: torch.device, **changes: Any) -> Segment:
    tokens = torch.randn(2, 32, 32, device=device)
    config = ShadowKVConfig(**changes)
    return compress(
        tokens, tokens, None, None, config, rank=4, key_weights=None, num_sink_chunks=1, num_outlier_chunks=1
    )


@pytest.mark.parametrize(
    ("factors", "values", "dtype"),
    [
        (RowKind.MODEL, RowKind.MODEL, torch.float32),
        (RowKind.MODEL, RowKind.INT8, torch.float16),
        (RowKind.INT8, RowKind.MODEL, torch.bfloat16),
        (RowKind.FP8, RowKind.INT8, torch.bfloat16),
    ],
)
def test_rows_lead_to_the_segments_tensors(
    factors: RowKind, values: RowKind, dtype: torch.dtype, device: torch.device
) -> None:
    batch = random_batch(
        [[5, 1], [], [7]],
        tails=[3, 0, 70],
        value_dim=64,
        dtype=dtype,
        factors=factors,
        values=values,
        layout=HALF,
        device=device,
    )
    described = read_rows(batch.table.segments)
    assert [[row[Field.FIRST_CHUNK] for row in rows] for rows in described] == [[0, 5], [], [0]]
    for rows, segments in zip(described, batch.segments, strict=True):
        for row, segment in zip(rows, segments, strict=True):
            num_chunks, num_exact, parts = segment.num_chunks, segment.exact_chunks.shape[1], segment.keys.tensors()
            assert row[Field.NUM_CHUNKS] == num_chunks and row[Field.NUM_EXACT] == num_exact
            rank = row[Field.RANK]
            for address, scales, kind, shape, store in [
                (Field.LANDMARKS, Field.LANDMARK_SCALES, factors, (2, num_chunks, 32), segment.landmarks),
                (Field.COEFFICIENTS, Field.COEFFICIENT_SCALES, factors, (num_chunks, 8, rank), None),
                (Field.VALUES, Field.VALUE_SCALES, values, (2, num_chunks, 8, 64), None),
            ]:
                found = read_packed(row[address], row[scales], shape, kind, dtype, device)
                if store is not None:
                    assert torch.allclose(found.double(), unpacked(store), rtol=1e-6, atol=0)
            for address, shape, held in [
                (Field.BASIS, (2, rank, 32), parts["basis"][0]),
                (Field.MEAN, (2, 1, 32), parts["basis"][1]),
            ]:
                assert torch.equal(tensor_at(row[address], shape, dtype, device), held)
            for address, held in zip((Field.COS, Field.SIN), parts["rotation"], strict=True):
                assert torch.equal(tensor_at(row[address], (num_chunks * 8, 8), torch.float32, device), held)
            exact = tensor_at(row[Field.EXACT_CHUNKS], (2, num_exact), torch.int64, device)
            assert torch.equal(exact, segment.exact_chunks)
            stored = tensor_at(row[Field.EXACT_VALUES], (2, num_exact * 8, 64), dtype, device)
            assert torch.equal(stored, segment.exact_values)


def test_regions_are_the_exact_chunks_and_the_tail(device: torch.device) -> None:
    batch = random_batch([[5, 1], []], tails=[3, 70], value_dim=64, device=device)
    regions = batch.table.regions
    assert regions[0, :, RegionField.LENGTH].tolist() == [24, 8, 0, 3]
    assert regions[1, :, RegionField.LENGTH].tolist() == [0, 0, 0, 70]
    expected = [
        [*((segment.exact_keys, segment.exact_values) for segment in segments), (tail.keys, tail.values)]
        for segments, tail in zip(batch.segments, batch.tails, strict=True)
    ]
    for rows, pieces in zip(read_rows(regions), expected, strict=True):
        for row, (keys, values) in zip(rows, pieces, strict=True):
            assert torch.equal(read_region(row, RegionField.KEYS, 2, 32, torch.float32, device), keys)
            assert torch.equal(read_region(row, RegionField.VALUES, 2, 64, torch.float32, device), values)


def test_tail_is_replaced_alone(device: torch.device) -> None:
    batch = random_batch([[5]], tails=[3], device=device)
    before = batch.table.regions.clone()
    keys, values = torch.randn(2, 2, 9, 32, device=device)
    batch.table.assign_tail(0, keys, values)
    assert torch.equal(batch.table.regions[0, :-1], before[0, :-1])
    [*_, row] = read_rows(batch.table.regions)[0]
    assert torch.equal(read_region(row, RegionField.VALUES, 2, 32, torch.float32, device), values)


def test_assigning_fewer_segments_empties_the_rest(device: torch.device) -> None:
    table = empty_table(device)
    segment = segment_of(device)
    table.assign(0, [segment, segment])
    assert table.segments[0, :, Field.NUM_CHUNKS].tolist() == [4, 4]
    table.assign(0, [])
    assert not table.segments.any() and not table.regions.any()


def test_table_keeps_what_it_points_to(device: torch.device) -> None:
    table = empty_table(device)
    table.assign(0, [segment_of(device)], (torch.ones(2, 4, 32, device=device), torch.ones(2, 4, 32, device=device)))
    row = read_rows(table.regions)[0][-1]
    torch.full((64, 1024), 3.0, device=device)  # would take the freed memory
    assert (read_region(row, RegionField.KEYS, 2, 32, torch.float32, device) == 1).all()


def test_too_many_segments_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="3 segments, and the table has room for 2"):
        empty_table(device).assign(0, [segment_of(device)] * 3)


@pytest.mark.parametrize(
    ("segment", "table", "reason"),
    [
        (dict(key_store="exact"), {}, "key_store='low_rank'"),
        (dict(factor_dtype="int8"), {}, "landmarks must be torch.float32, got torch.int8"),
        ({}, dict(factors=RowKind.FP8), "landmarks must be torch.float8_e4m3fn, got torch.float32"),
        (dict(value_dtype="int8"), {}, "values must be torch.float32, got torch.int8"),
        ({}, dict(dtype=torch.float16), "landmarks must be torch.float16"),
    ],
)
def test_segments_of_another_kind_are_refused(
    segment: dict[str, Any], table: dict[str, Any], reason: str, device: torch.device
) -> None:
    with pytest.raises(ValueError, match=reason):
        empty_table(device, **table).assign(0, [segment_of(device, **segment)])


def test_tensors_that_kernels_cannot_read_are_refused(device: torch.device) -> None:
    tokens = torch.randn(2, 9, 32, device=device)
    buffer = torch.randn(2 * 8 * 32 + 1, device=device)
    for keys, reason in [
        (buffer[1:].view(2, 8, 32), "multiple of 16 bytes"),
        (torch.randn(2, 8, 64, device=device)[:, :, ::2], "contiguous"),
        (
            torch.randn(1 + 2 * 257, device=device)[:514].view(2, 257)[:, :256].unflatten(1, (8, 32)),
            "257 elements apart",
        ),
        (tokens.double(), "must be torch.float32"),
    ]:
        with pytest.raises(ValueError, match=reason):
            empty_table(device).assign_tail(0, keys, tokens)


def test_empty_memory_is_an_empty_tensor(device: torch.device) -> None:
    assert tensor_at(0, (2, 0, 3), torch.float16, device).shape == (2, 0, 3)


@pytest.mark.gpu
def test_pinned_host_memory_is_read_by_the_device(device: torch.device) -> None:
    host = torch.arange(1024, dtype=torch.float32).pin_memory()
    assert torch.equal(tensor_at(host.data_ptr(), (32, 32), torch.float32, device).cpu(), host.view(32, 32))


@pytest.mark.gpu
def test_pageable_host_memory_is_refused(device: torch.device) -> None:
    tokens = torch.randn(2, 8, 32)
    with pytest.raises(ValueError, match="pageable host memory"):
        empty_table(device).assign_tail(0, tokens, tokens)
