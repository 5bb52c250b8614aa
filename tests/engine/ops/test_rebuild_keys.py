"""Rebuilt keys against fp64, written to the slots of missing chunks and nowhere else."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from longshadow.engine.ops.backend import implementation
from longshadow.engine.ops.configuration import SHARED_MEMORY
from longshadow.engine.ops.rotary import RotaryStyle
from longshadow.engine.ops.tables import RowKind
from longshadow.engine.shadowkv.rope import RotaryLayout, Rotation, rotate
from tests.engine.ops import batches
from tests.engine.ops.batches import Batch, random_batch
from tests.engine.ops.checks import assert_as_exact, poisoned, run_compiler

HALF = RotaryLayout(style="half", rotary_dim=32)


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What plan_chunks would say, at random: chosen, slots, misses [B, H, M] and num_misses [B, H]."""

    chosen: torch.Tensor
    slots: torch.Tensor
    misses: torch.Tensor
    num_misses: torch.Tensor
    num_slots: int

    @property
    def lists(self) -> tuple[torch.Tensor, ...]:
        return self.chosen, self.slots, self.misses, self.num_misses


def random_plan(batch: Batch, *, width: int, miss_rate: float, seed: int = 0) -> Plan:
    """Up to `width` chosen chunks per head, ascending, of which about `miss_rate` are missing."""
    generator = torch.Generator().manual_seed(seed)
    num_slots = width + 3
    shape = (len(batch.segments), batch.num_kv_heads, width)
    chosen, slots, misses = (torch.full(shape, -1, dtype=torch.int32) for _ in range(3))
    num_misses = torch.zeros(shape[:2], dtype=torch.int32)
    for sequence, num_chunks in enumerate(batch.num_chunks):
        for head in range(batch.num_kv_heads):
            count = min(width, num_chunks)
            chunks = torch.randperm(num_chunks, generator=generator)[:count].sort().values
            missing = (torch.rand(count, generator=generator) < miss_rate).nonzero().squeeze(1)
            chosen[sequence, head, :count] = chunks
            slots[sequence, head, :count] = torch.randperm(num_slots, generator=generator)[:count]
            misses[sequence, head, : len(missing)] = missing
            num_misses[sequence, head] = len(missing)
    on_device = (tensor.to(batch.device) for tensor in (chosen, slots, misses, num_misses))
    return Plan(**dict(zip(("chosen", "slots", "misses", "num_misses"), on_device, strict=True)), num_slots=num_slots)


def rebuild(batch: Batch, plan: Plan, kind: RowKind, backend: str) -> torch.Tensor:
    """The slots after the operator, poisoned before."""
    shape = (len(batch.segments), batch.num_kv_heads, plan.num_slots, batch.chunk_size, batch.key_dim)
    key_slots = poisoned(*shape, dtype=batch.dtype, device=batch.device)
    style = RotaryStyle.of(batch.layout)
    rotary_dim = 0 if batch.layout is None else batch.layout.rotary_dim
    implementation("rebuild_keys", backend, batch.device)(
        batch.table.segments, *plan.lists, kind, style, rotary_dim, key_slots, batch.table.rotation_fp32
    )
    return key_slots


def expected_slots(batch: Batch, plan: Plan) -> torch.Tensor:
    """The same in fp64, NaN where nothing is to be written."""
    shape = (len(batch.segments), batch.num_kv_heads, plan.num_slots, batch.chunk_size, batch.key_dim)
    slots = poisoned(*shape, dtype=torch.float64, device=batch.device)
    for sequence, segments in enumerate(batch.segments):
        if not segments:
            continue
        keys = torch.cat([exact_keys(segment.keys.tensors(), batch) for segment in segments], 1)
        for head in range(batch.num_kv_heads):
            for miss in plan.misses[sequence, head, : int(plan.num_misses[sequence, head])].tolist():
                chunk, slot = int(plan.chosen[sequence, head, miss]), int(plan.slots[sequence, head, miss])
                slots[sequence, head, slot] = keys[head, chunk]
    return slots


def exact_keys(parts: dict[str, list[torch.Tensor]], batch: Batch) -> torch.Tensor:
    """What a segment's factors stand for, fp64 [H, C, c, D]."""
    rows, *scales = parts["factors"]
    coefficients = rows.double() * scales[0].double().unsqueeze(2) if scales else rows.double()
    basis, mean = (tensor.double() for tensor in parts["basis"])
    keys = coefficients.flatten(0, 1) @ basis + mean.view(batch.num_kv_heads, 1, -1)
    if batch.layout is not None:
        keys = rotate(keys, Rotation(*parts["rotation"]), batch.layout)
    return keys.unflatten(1, (-1, batch.chunk_size))


def check(batch: Batch, plan: Plan, kind: RowKind, backend: str) -> None:
    result, reference, expected = (
        rebuild(batch, plan, kind, backend),
        rebuild(batch, plan, kind, "reference"),
        expected_slots(batch, plan),
    )
    written = ~expected.isnan()
    for slots in (result, reference):
        assert torch.equal(slots.isnan(), ~written)
    assert_as_exact(result[written], reference[written], expected[written])


@pytest.mark.parametrize("kind", list(RowKind))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_of_several_segments(dtype: torch.dtype, kind: RowKind, backend: str, device: torch.device) -> None:
    """Ragged sequences, one without segments; ranks that differ, because a segment of few tokens has a lower one."""
    batch = random_batch(
        [[9, 2, 30], [], [1], [63]], layout=HALF, rank=40, dtype=dtype, factors=kind, device=device, chunk_size=8
    )
    check(batch, random_plan(batch, width=21, miss_rate=0.6), kind, backend)


@pytest.mark.parametrize(
    ("layout", "head_dim"),
    [
        (None, 32),
        (RotaryLayout(style="half", rotary_dim=16), 64),
        (RotaryLayout(style="half", rotary_dim=80), 80),
        (RotaryLayout(style="interleaved", rotary_dim=48), 96),
        (RotaryLayout(style="interleaved", rotary_dim=128), 128),
        (RotaryLayout(style="half", rotary_dim=192), 192),
        (RotaryLayout(style="half", rotary_dim=64), 256),
    ],
)
def test_every_rotation_and_head_dim(
    layout: RotaryLayout | None, head_dim: int, backend: str, device: torch.device
) -> None:
    batch = random_batch([[12]], layout=layout, key_dim=head_dim, num_kv_heads=1, device=device, rank=32)
    check(batch, random_plan(batch, width=7, miss_rate=0.9), RowKind.MODEL, backend)


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_every_chunk_size(chunk_size: int, backend: str, device: torch.device) -> None:
    batch = random_batch([[5, 12], [3]], layout=HALF, num_kv_heads=1, chunk_size=chunk_size, device=device)
    check(batch, random_plan(batch, width=6, miss_rate=0.5), RowKind.MODEL, backend)


def test_angles_in_the_models_dtype(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def rotation_in_half(*arguments: Any) -> Rotation:
        rotation = full(*arguments)
        return Rotation(rotation.cos.half(), rotation.sin.half())

    full = batches._rotation
    monkeypatch.setattr(batches, "_rotation", rotation_in_half)
    batch = random_batch([[9], [4, 3]], layout=HALF, dtype=torch.float16, device=device)
    assert not batch.table.rotation_fp32
    check(batch, random_plan(batch, width=5, miss_rate=0.8), RowKind.MODEL, backend)


@pytest.mark.parametrize("miss_rate", [0.0, 1.0])
def test_all_or_nothing_is_missing(miss_rate: float, backend: str, device: torch.device) -> None:
    batch = random_batch([[20], [40]], layout=HALF, device=device)
    plan = random_plan(batch, width=33, miss_rate=miss_rate)
    check(batch, plan, RowKind.MODEL, backend)


def test_opcheck(device: torch.device) -> None:
    batch = random_batch([[5], [3]], layout=HALF, device=device)
    plan = random_plan(batch, width=4, miss_rate=0.5)
    slots = torch.zeros(2, 2, plan.num_slots, 8, 32, device=device)
    torch.library.opcheck(
        torch.ops.longshadow.rebuild_keys.default,
        (batch.table.segments, *plan.lists, int(RowKind.MODEL), int(RotaryStyle.HALF), 32, slots),
    )


def test_it_compiles_for_every_device() -> None:
    printed = run_compiler(
        "from longshadow.engine.ops.configuration import compile_ahead_of_time\n"
        "from longshadow.engine.ops.rebuild_keys.triton_kernel import CONFIGURATIONS\n"
        "for capability in (80, 90, 100):\n"
        "    print(compile_ahead_of_time(CONFIGURATIONS[1], capability).metadata.shared)\n"
    )
    sizes = [int(line) for line in printed.split()]
    assert len(sizes) == 3 and max(sizes) <= SHARED_MEMORY
