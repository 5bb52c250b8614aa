"""New tokens behind tails: exact copies, at the right place and nowhere else."""

import pytest
import torch

from longshadow.engine.ops.backend import implementation
from longshadow.engine.ops.tables import RegionField
from tests.engine.ops.batches import Batch, random_batch

TAILS = (1, 7, 63, 120)


def batch_with_room(dtype: torch.dtype, device: torch.device, key_dim: int, value_dim: int) -> Batch:
    """Tails with room for a token, one of them exactly for one; the table tells where their buffers are."""
    batch = random_batch(
        [[], [2], [1, 1], []],
        tails=TAILS,
        num_kv_heads=2,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=dtype,
        device=device,
    )
    for index, tail in enumerate(batch.tails):
        while tail.tensors[0].shape[1] > tail.num_tokens + 1 and index == 1:
            tail.append(tail.keys[:, :1], tail.values[:, :1])
        tail.make_room(1)
        batch.table.assign_tail(index, tail.keys, tail.values)
    return batch


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 32), (80, 64), (96, 256)])
def test_the_token_comes_behind_the_tail(
    backend: str, dtype: torch.dtype, key_dim: int, value_dim: int, device: torch.device
) -> None:
    batch = batch_with_room(dtype, device, key_dim, value_dim)
    before = [[tensor.clone() for tensor in tail.tensors] for tail in batch.tails]
    counts = [tail.num_tokens + 1 for tail in batch.tails]
    counts[2] = 0  # takes no token
    keys, values = (torch.randn(4, 2, dim, device=device).to(dtype) for dim in (key_dim, value_dim))
    regions = batch.table.regions.clone()
    lengths = torch.tensor(counts, dtype=torch.int32, device=device)
    implementation("append_tokens", backend, device)(keys, values, lengths, batch.table.regions)
    regions[:, -1, RegionField.LENGTH] = lengths
    assert torch.equal(batch.table.regions, regions)
    for index, (tail, old, count) in enumerate(zip(batch.tails, before, counts, strict=True)):
        for held, expected, new in zip(tail.tensors, old, (keys, values), strict=True):
            if count:
                expected[:, count - 1] = new[index]
            # As bits: what lies behind the token was never written and may be NaN.
            assert torch.equal(held.view(torch.uint8), expected.view(torch.uint8))


def test_opcheck(device: torch.device) -> None:
    batch = batch_with_room(torch.float32, device, 32, 32)
    lengths = torch.tensor([tail.num_tokens + 1 for tail in batch.tails], dtype=torch.int32, device=device)
    keys, values = torch.randn(2, 4, 2, 32, device=device)
    torch.library.opcheck(torch.ops.longshadow.append_tokens.default, (keys, values, lengths, batch.table.regions))
