"""Products with weights and full attention, computed by hand for a small model."""

from dataclasses import replace

import pytest

from longshadow.engine.planning import products
from longshadow.engine.planning.implementation import FUSED
from longshadow.engine.planning.products import Work
from tests.engine.planning.test_operators import SHAPE, agrees


def test_full_attention() -> None:
    num_bytes, operations = 2 * 3 * 810 * 64, {"bf16": 4 * 3 * 810 * 64}
    work = products.full_attention(SHAPE, 3, 810)
    assert agrees(work, device_bytes=num_bytes, operations=operations, num_kernels=2)
    assert products.full_attention(SHAPE, 3, 810, offloaded=True).link_bytes == num_bytes


def test_matrix_products() -> None:
    qkv = products.qkv(SHAPE, 3, FUSED)
    operations = {"bf16": 2 * 3 * 64 * 128}
    assert agrees(qkv, device_bytes=2 * (64 * 128 + 3 * (64 + 128)), operations=operations, num_kernels=3)
    ffn = products.ffn(SHAPE, 3, FUSED)
    activations = 2 * 3 * (64 + 192 + (192 + 96) + 96 + 64)
    operations = {"bf16": 2 * 3 * 3 * 64 * 96}
    assert agrees(ffn, device_bytes=2 * 3 * 64 * 96 + activations, operations=operations, num_kernels=5)
    packed = products.output_projection(replace(SHAPE, weight_bits=4, weight_format="fp8"), 3)
    assert agrees(packed, device_bytes=64 * 64 / 2 + 2 * 3 * 128, operations={"fp8": 2 * 3 * 64 * 64}, num_kernels=1)
    head = products.head(SHAPE, 3, FUSED)
    assert head.device_bytes == 64_000 * 2 + 2 * 3 * 1000 * 4 and head.operations == {"bf16": 2 * 3 * 64_000}


def test_experts_are_read_as_tokens_are_expected_to_choose_them() -> None:
    shape = replace(SHAPE, num_experts=8, num_active_experts=2)
    one, many = products.ffn(shape, 1, FUSED), products.ffn(shape, 10_000, FUSED)
    expert = 2 * 3 * 64 * 96
    assert one.device_bytes == pytest.approx(2 * expert + 2 * 2 * 704 + 2 * 64 * 8)
    assert many.device_bytes == pytest.approx(8 * expert + 20_000 * 2 * 704 + 2 * 64 * 8)
    assert one.operations == {"bf16": 2 * 2 * 3 * 64 * 96}


def test_works_add_up() -> None:
    both = Work(device_bytes=1, operations={"bf16": 2}, num_kernels=1) + Work(
        link_bytes=3, operations={"bf16": 4, "tf32": 5}, num_kernels=2
    )
    assert both == Work(device_bytes=1, link_bytes=3, operations={"bf16": 6, "tf32": 5}, num_kernels=3)
