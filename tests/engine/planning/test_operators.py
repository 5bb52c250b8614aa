"""Bytes, operations and kernels of every operator, computed by hand for a small model."""

from dataclasses import replace
from typing import Any

import pytest

from longshadow.engine.planning import operators
from longshadow.engine.planning.implementation import FUSED, ORIGINAL
from longshadow.engine.planning.layout import SegmentSize, SequenceSize
from longshadow.engine.planning.model_shape import ModelShape
from longshadow.engine.planning.operators import DecodeStep
from longshadow.engine.planning.products import Work
from longshadow.engine.shadowkv.config import ShadowKVConfig

# 3 sequences x 2 KV heads = 6 rows, 12 query rows; vectors of 16 elements, 2 bytes each.
SHAPE = ModelShape(
    name="it",
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=1000,
    rotary_dim=8,
)
# 100 chunks of 8 tokens, of them 3 exact per head, and 10 tokens in the tail; 5 chunks selected of 15 candidates.
SIZE = SequenceSize(
    num_tokens=810,
    segments=(SegmentSize(num_tokens=800, rank=10, num_exact_chunks=3),),
    tail_tokens=10,
    tail_capacity=74,
    logged_rotations=10,
    chunk_size=8,
    num_selected_chunks=5,
    num_candidate_chunks=15,
    num_slots=15,
)


def step(size: SequenceSize = SIZE, **changes: Any) -> DecodeStep:
    implementation = changes.pop("implementation", FUSED)
    config = ShadowKVConfig(rank=10, **changes)
    return DecodeStep(shape=SHAPE, config=config, size=size, batch=3, hit_rate=0.75, implementation=implementation)


def agrees(work: Work, **expected: Any) -> bool:
    wanted = Work(**expected)
    return (
        work.device_bytes == pytest.approx(wanted.device_bytes)
        and work.link_bytes == pytest.approx(wanted.link_bytes)
        and dict(work.operations) == pytest.approx(dict(wanted.operations))
        and work.num_kernels == wanted.num_kernels
    )


def test_score_chunks() -> None:
    landmarks, logits, scores, query = 6 * 100 * 32, 12 * 100 * 4, 6 * 100 * 4, 12 * 32
    operations = {"bf16": 2 * 12 * 100 * 16}
    bf16 = landmarks + 2 * logits + scores + query
    assert agrees(operators.score_chunks(step()), device_bytes=bf16, operations=operations, num_kernels=2)
    int8 = 6 * 100 * (16 + 4) + 2 * logits + scores + query
    assert operators.score_chunks(step(factor_dtype="int8")).device_bytes == int8
    original = landmarks + 3 * 12 * 100 * 2 + query
    work = operators.score_chunks(step(implementation=ORIGINAL))
    assert agrees(work, device_bytes=original, operations=operations, num_kernels=3)


def test_group_max() -> None:
    read, written = 12 * 100 * 2, 6 * 100 * (2 + 8)
    assert agrees(operators.group_max(step(implementation=ORIGINAL)), device_bytes=read + written, num_kernels=1)


def test_top_chunks() -> None:
    assert agrees(operators.top_chunks(step()), device_bytes=6 * (100 * 4 * 5 + 15 * 8), num_kernels=1)
    work = operators.top_chunks(step(implementation=ORIGINAL))
    assert agrees(work, device_bytes=6 * (100 * 2 * 3 + 15 * 8), num_kernels=17)


def test_plan_chunks() -> None:
    assert agrees(operators.plan_chunks(step()), device_bytes=6 * 8 * (4 * 15 + 2 * 15), num_kernels=1)
    assert operators.plan_chunks(step(replace(SIZE, num_slots=0))) == Work()


def test_fetch_values() -> None:
    missed = 6 * 40 / 4
    assert agrees(operators.fetch_values(step()), device_bytes=missed * 32, link_bytes=missed * 32, num_kernels=1)
    # 16 bytes and a sector of 32 for the scale
    work = operators.fetch_values(step(value_dtype="int8"))
    assert agrees(work, device_bytes=missed * 32, link_bytes=missed * 48, num_kernels=1)
    work = operators.fetch_values(step(value_dtype="int8", value_store="device"))
    assert agrees(work, device_bytes=missed * (20 + 32), num_kernels=1)
    work = operators.fetch_values(step(replace(SIZE, num_slots=0)))
    assert work.link_bytes == 6 * 40 * 32, "without slots nothing is there"
    moved = 2 * 6 * 40 * 0.75 * 32
    work = operators.fetch_values(step(implementation=ORIGINAL))
    assert agrees(work, device_bytes=missed * 32 + moved, link_bytes=missed * 32, num_kernels=1)


def test_rebuild_keys() -> None:
    missed = 6 * 120 / 4
    basis, rotations, written = 6 * (10 + 1) * 32, missed * 8 * 2, missed * 32
    operations = {"bf16": 2 * missed * 10 * 16}
    bf16 = missed * 20 + basis + rotations + written
    assert agrees(operators.rebuild_keys(step()), device_bytes=bf16, operations=operations, num_kernels=1)
    int8 = missed * 14 + basis + rotations + written
    assert operators.rebuild_keys(step(factor_dtype="int8")).device_bytes == pytest.approx(int8)
    work = operators.rebuild_keys(step(key_store="exact"))
    assert agrees(work, device_bytes=missed * 32, link_bytes=missed * 32, num_kernels=1)
    work = operators.rebuild_keys(step(key_store="exact", value_store="device"))
    assert agrees(work, device_bytes=missed * 64, num_kernels=1)


def test_choose_tokens() -> None:
    keys, logits, top = 6 * 120 * 32, 12 * 120 * 4, 6 * (120 * 4 * 5 + 40 * 8)
    operations = {"bf16": 2 * 12 * 120 * 16}
    work = operators.choose_tokens(step())
    assert agrees(work, device_bytes=keys + logits + top, operations=operations, num_kernels=2)
    assert operators.choose_tokens(step(replace(SIZE, num_candidate_chunks=5))) == Work(), "all are attended"


def test_sparse_attention() -> None:
    tokens = 40 + 3 * 8 + 10
    work = operators.sparse_attention(step())
    assert agrees(work, device_bytes=2 * 6 * tokens * 32, operations={"bf16": 4 * 12 * tokens * 16}, num_kernels=2)


def test_summarize_keys() -> None:
    config = ShadowKVConfig(rank=10)
    keys, factors, landmarks, queries = 800 * 64, 800 * 20, 100 * 2 * 32, 800 * 128
    gram, coefficients, basis = 2 * 800 * 32 * 32, 2 * 800 * 32 * 10, 8 * 2 * 32 * 10 * (32 + 20)
    work = operators.summarize_keys(SHAPE, config, 800)
    assert work.device_bytes == 2 * keys + factors + landmarks + queries
    assert work.operations == {"tf32": gram + coefficients + basis}
    exact = operators.summarize_keys(SHAPE, replace(config, key_store="exact", query_weighted=False), 800)
    assert agrees(exact, device_bytes=keys + landmarks, num_kernels=1)


def test_store_values() -> None:
    values = 800 * 64
    assert agrees(
        operators.store_values(SHAPE, ShadowKVConfig(), 800), device_bytes=values, link_bytes=values, num_kernels=1
    )
    config = ShadowKVConfig(value_store="device", value_dtype="int8", key_store="exact")
    assert operators.store_values(SHAPE, config, 800).device_bytes == values + 2 * 800 * 2 * 20
