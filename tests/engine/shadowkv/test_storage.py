"""Row stores and the growing buffer."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longshadow.engine.shadowkv.storage import ExactTokens, RowStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_rows_come_back_exactly(dtype: torch.dtype) -> None:
    rows = torch.randn(11, 3, 5).to(dtype)
    store = RowStore(rows.transpose(1, 2), host=True)
    index = torch.tensor([7, 0, 7])
    assert torch.equal(store.gather(index), rows.transpose(1, 2)[index])
    assert torch.equal(store.slice(2, 9), rows.transpose(1, 2)[2:9])
    assert sum(tensor.nbytes for tensor in store.tensors) == rows.nbytes


def test_int8_error_is_half_a_step_of_each_group() -> None:
    rows = torch.randn(11, 3, 64) * torch.logspace(-3, 3, 11).view(-1, 1, 1)
    store = RowStore(rows, quantized="int8")
    step = rows.abs().amax(-1, keepdim=True) / 127
    assert ((store.slice(0, 11) - rows).abs() <= 0.5001 * step).all()
    assert torch.equal(store.gather(torch.tensor([4])), store.slice(4, 5))
    assert sum(tensor.nbytes for tensor in store.tensors) == rows.numel() + 11 * 3 * 4
    assert RowStore(torch.zeros(1, 1, 4), quantized="int8").slice(0, 1).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_error_is_half_a_step_of_its_three_bits(dtype: torch.dtype) -> None:
    rows = (torch.randn(11, 3, 64) * torch.logspace(-3, 3, 11).view(-1, 1, 1)).to(dtype)
    store = RowStore(rows, quantized="fp8")
    largest = rows.float().abs().amax(-1, keepdim=True)
    error = (store.slice(0, 11).float() - rows.float()).abs()
    # Half a step: 2^-4 of normal numbers, 2^-10 x scale of those below 2^-6 x scale; and the result's own rounding.
    rounding = torch.finfo(dtype).eps * rows.float().abs()
    assert (error <= torch.maximum(rows.float().abs() / 16, largest / 448 / 1024) * 1.001 + rounding).all()
    assert store.slice(0, 11).float().abs().amax(-1, keepdim=True).allclose(largest, rtol=2 * torch.finfo(dtype).eps)
    assert torch.equal(store.gather(torch.tensor([4, 0])), store.slice(0, 11)[[4, 0]])
    assert torch.equal(store.gather_groups(torch.tensor([4, 32])), store.slice(0, 11).flatten(0, 1)[[4, 32]])
    assert sum(tensor.nbytes for tensor in store.tensors) == rows.numel() + 11 * 3 * 4
    assert RowStore(torch.zeros(1, 1, 4), quantized="fp8").slice(0, 1).abs().max() == 0


@pytest.mark.parametrize("quantized", [None, "int8", "fp8"])
def test_a_store_comes_back_from_its_tensors(quantized: Literal["int8", "fp8"] | None) -> None:
    store = RowStore(torch.randn(5, 2, 16), quantized=quantized)
    assert store.rows.is_contiguous()
    assert (store.scales is None) == (quantized is None)
    restored = RowStore.restore(store.tensors, dtype=torch.float32, device=torch.device("cpu"), host=True)
    assert torch.equal(restored.slice(0, 5), store.slice(0, 5))
    assert restored.rows.data_ptr() != store.rows.data_ptr()


@given(st.lists(st.one_of(st.integers(1, 90), st.integers(-90, -1)), max_size=12))
def test_exact_tokens_behave_like_a_list(steps: list[int]) -> None:
    """Positive: append that many tokens; negative: take that many (or all) from the front."""
    buffer, expected, clock = ExactTokens(), torch.zeros(1, 0, 2), 0
    for step in steps:
        if step > 0:
            new = torch.arange(clock, clock + 2 * step).view(1, step, 2).float()
            clock += 2 * step
            buffer.append(new, -new)
            expected = torch.cat([expected, new], 1)
        elif buffer.num_tokens:
            count = min(-step, buffer.num_tokens)
            keys, values = buffer.take_front(count)
            assert torch.equal(keys, expected[:, :count]) and torch.equal(values, -keys)
            expected = expected[:, count:]
        assert buffer.num_tokens == expected.shape[1]
        if buffer.tensors:
            assert torch.equal(buffer.keys, expected) and torch.equal(buffer.values, -expected)
            room = max(64, buffer.num_tokens // 4)
            assert buffer.tensors[0].shape[1] <= max(buffer.num_tokens + room, 64 + 90 + 90 * 12)


def test_a_copy_is_independent() -> None:
    buffer = ExactTokens()
    buffer.append(torch.ones(1, 3, 2), torch.ones(1, 3, 2))
    copied = buffer.copy()
    buffer.append(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    copied.append(torch.full((1, 1, 2), 5.0), torch.full((1, 1, 2), 5.0))
    assert copied.keys[0, 3, 0] == 5 and buffer.keys[0, 3, 0] == 0
