"""Fetched values: exactly what the segments hold, where it was missing and nowhere else."""

from dataclasses import dataclass

import pytest
import torch

from longshadow.engine.ops.backend import implementation
from longshadow.engine.ops.configuration import SHARED_MEMORY
from longshadow.engine.ops.tables import RowKind
from tests.engine.ops.batches import Batch, random_batch
from tests.engine.ops.checks import poisoned, run_compiler


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """slot_chunks [B, H, S], places [B, H, T], has_values [B, H, S, c]."""

    slot_chunks: torch.Tensor
    places: torch.Tensor
    has_values: torch.Tensor


def random_request(
    batch: Batch, *, num_slots: int, num_places: int, missing_rate: float = 0.5, seed: int = 0
) -> Request:
    """Slots with chunks of their sequence (some empty), places in those, in no order, with gaps and an end of -1."""
    generator = torch.Generator().manual_seed(seed)
    heads = (len(batch.segments), batch.num_kv_heads)
    slot_chunks = torch.full((*heads, num_slots), -1, dtype=torch.int32)
    places = torch.full((*heads, num_places), -1, dtype=torch.int32)
    has_values = (torch.rand(*heads, num_slots, batch.chunk_size, generator=generator) >= missing_rate).to(torch.uint8)
    for sequence, num_chunks in enumerate(batch.num_chunks):
        for head in range(heads[1]):
            count = min(num_slots, num_chunks)
            slots = torch.randperm(num_slots, generator=generator)[:count]
            slot_chunks[sequence, head, slots] = torch.randperm(num_chunks, generator=generator)[:count].int()
            every = (slots.unsqueeze(1) * batch.chunk_size + torch.arange(batch.chunk_size)).flatten()
            chosen = every[torch.randperm(len(every), generator=generator)][: num_places * 3 // 4].int()
            where = torch.randperm(num_places, generator=generator)[: len(chosen)]
            places[sequence, head, where] = chosen
    return Request(
        slot_chunks=slot_chunks.to(batch.device),
        places=places.to(batch.device),
        has_values=has_values.to(batch.device),
    )


def fetch(batch: Batch, request: Request, kind: RowKind, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots, poisoned before, and has_values after the operator."""
    shape = (*request.has_values.shape, batch.value_dim)
    value_slots = poisoned(*shape, dtype=batch.dtype, device=batch.device)
    has_values = request.has_values.clone()
    implementation("fetch_values", backend, batch.device)(
        batch.table.segments, request.slot_chunks, request.places, kind, has_values, value_slots
    )
    return value_slots, has_values


def check(batch: Batch, request: Request, kind: RowKind, backend: str) -> None:
    """Against the segments themselves."""
    value_slots, has_values = fetch(batch, request, kind, backend)
    expected_slots = poisoned(*value_slots.shape, dtype=batch.dtype, device=batch.device)
    expected_has = request.has_values.clone()
    for sequence, segments in enumerate(batch.segments):
        if not segments:
            continue
        values = torch.cat([segment.values.span(0, segment.num_chunks) for segment in segments], 1)
        for head in range(batch.num_kv_heads):
            for place in request.places[sequence, head].tolist():
                slot, offset = divmod(place, batch.chunk_size)
                if place >= 0 and not request.has_values[sequence, head, slot, offset]:
                    chunk = int(request.slot_chunks[sequence, head, slot])
                    expected_slots[sequence, head, slot, offset] = values[head, chunk, offset]
                    expected_has[sequence, head, slot, offset] = 1
    assert torch.equal(has_values, expected_has)
    # Triton's interpreter rounds to bf16 towards zero.
    truncates = batch.dtype == torch.bfloat16 and kind != RowKind.MODEL and batch.device.type == "cpu"
    tolerance = torch.finfo(batch.dtype).eps if truncates and backend == "triton" else 0
    torch.testing.assert_close(value_slots, expected_slots, rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
@pytest.mark.parametrize("kind", [RowKind.MODEL, RowKind.INT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_of_several_segments(dtype: torch.dtype, kind: RowKind, backend: str, device: torch.device) -> None:
    batch = random_batch([[9, 2, 30], [], [1], [63]], dtype=dtype, values=kind, device=device, share_first=False)
    check(batch, random_request(batch, num_slots=13, num_places=67), kind, backend)


@pytest.mark.parametrize("kind", [RowKind.MODEL, RowKind.INT8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_every_head_dim(head_dim: int, kind: RowKind, backend: str, device: torch.device) -> None:
    batch = random_batch([[7, 5]], value_dim=head_dim, num_kv_heads=1, dtype=torch.float16, values=kind, device=device)
    check(batch, random_request(batch, num_slots=5, num_places=29), kind, backend)


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_every_chunk_size(chunk_size: int, backend: str, device: torch.device) -> None:
    batch = random_batch([[5, 40], [3]], chunk_size=chunk_size, device=device)
    check(batch, random_request(batch, num_slots=6, num_places=40), RowKind.MODEL, backend)


@pytest.mark.parametrize("missing_rate", [0.0, 1.0])
def test_all_or_nothing_is_missing(missing_rate: float, backend: str, device: torch.device) -> None:
    batch = random_batch([[40], [20]], device=device, share_first=True)
    request = random_request(batch, num_slots=30, num_places=200, missing_rate=missing_rate)
    check(batch, request, RowKind.MODEL, backend)


def test_a_head_dim_that_loads_cannot_be_aligned_to_is_refused(device: torch.device) -> None:
    from longshadow.engine.ops.fetch_values.triton_kernel import fetch_values

    slots = torch.zeros(1, 1, 2, 8, 24, dtype=torch.float16, device=device)
    lists = torch.zeros(1, 1, 2, dtype=torch.int32, device=device)
    table = torch.zeros(1, 1, 17, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        fetch_values(table, lists, lists, RowKind.INT8, slots[..., 0].to(torch.uint8), slots)


def test_opcheck(device: torch.device) -> None:
    batch = random_batch([[5], [3]], device=device)
    request = random_request(batch, num_slots=4, num_places=9)
    slots = torch.zeros(*request.has_values.shape, 32, device=device)
    torch.library.opcheck(
        torch.ops.longshadow.fetch_values.default,
        (batch.table.segments, request.slot_chunks, request.places, int(RowKind.MODEL), request.has_values, slots),
    )


def test_it_compiles_for_every_device() -> None:
    printed = run_compiler(
        "from longshadow.engine.ops.configuration import compile_ahead_of_time\n"
        "from longshadow.engine.ops.fetch_values.triton_kernel import CONFIGURATIONS\n"
        "for capability in (80, 90, 100):\n"
        "    kernel = compile_ahead_of_time(CONFIGURATIONS[1], capability)\n"
        "    print(kernel.metadata.shared, 'ld.global.v4' in kernel.asm['ptx'])\n"
    )
    lines = [line.split() for line in printed.splitlines()]
    assert len(lines) == 3
    assert all(int(shared) <= SHARED_MEMORY and wide == "True" for shared, wide in lines)
