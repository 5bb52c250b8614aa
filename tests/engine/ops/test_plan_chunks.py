"""Slots for chosen chunks, step after step, against the rule written for one chunk at a time."""

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.ops.backend import implementation
from longshadow.engine.ops.plan_chunks import cuda_kernel
from longshadow.engine.shadowkv.resident import ResidentChunks
from tests.engine.ops.checks import check_that_it_compiles, poisoned

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton", "cuda"], indirect=True)
CHUNK_SIZE = 3


@dataclass
class Row:
    """One row's slots, and the specification of what a step does to them."""

    chunks: list[int]
    uses: list[int]
    has_values: list[list[int]]

    @classmethod
    def empty(cls, num_slots: int) -> "Row":
        return cls([-1] * num_slots, [0] * num_slots, [[0] * CHUNK_SIZE for _ in range(num_slots)])

    def plan(self, chosen: list[int], step: int) -> tuple[list[int], list[int]]:
        """Slots of the chosen chunks, and the places of the missing ones."""
        slots = [self.chunks.index(chunk) if chunk >= 0 and chunk in self.chunks else -1 for chunk in chosen]
        misses = [place for place, chunk in enumerate(chosen) if chunk >= 0 and slots[place] < 0]
        free = sorted((use, slot) for slot, use in enumerate(self.uses) if slot not in slots)
        for place, (_, slot) in zip(misses, free, strict=False):
            slots[place] = slot
            self.chunks[slot] = chosen[place]
            self.has_values[slot] = [0] * CHUNK_SIZE
        for slot in slots:
            if slot >= 0:
                self.uses[slot] = step
        return slots, misses


class State:
    """The operator's tensors beside the rows of the specification."""

    def __init__(self, backend: str, batch_size: int, num_heads: int, num_slots: int, device: torch.device) -> None:
        self.plan_chunks = implementation("plan_chunks", backend, device)
        self.rows = [[Row.empty(num_slots) for _ in range(num_heads)] for _ in range(batch_size)]
        shape = (batch_size, num_heads, num_slots)
        self.slot_chunks = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.last_used = torch.zeros(shape, dtype=torch.int32, device=device)
        self.has_values = torch.zeros(*shape, CHUNK_SIZE, dtype=torch.uint8, device=device)

    def fetch(self, number: random.Random) -> None:
        """Marks some values as fetched."""
        for rows in self.rows:
            for row in rows:
                row.has_values = [[number.randint(0, 1) for _ in range(CHUNK_SIZE)] for _ in row.chunks]
        self.has_values.copy_(torch.tensor([[row.has_values for row in rows] for rows in self.rows]))

    def check_step(self, chosen: list[list[list[int]]], step: int) -> None:
        device = self.slot_chunks.device
        asked = torch.tensor(chosen, dtype=torch.int32, device=device)
        slots, misses = (poisoned(*asked.shape, dtype=torch.int32, device=device) for _ in range(2))
        num_misses = poisoned(*asked.shape[:2], dtype=torch.int32, device=device)
        now = torch.tensor([step], dtype=torch.int32, device=device)
        self.plan_chunks(asked, self.slot_chunks, self.last_used, self.has_values, now, slots, misses, num_misses)
        plans = [
            [row.plan(wanted, step) for row, wanted in zip(*pair, strict=True)]
            for pair in zip(self.rows, chosen, strict=True)
        ]
        width = asked.shape[2]
        assert slots.tolist() == [[plan[0] for plan in of_sequence] for of_sequence in plans]
        assert misses.tolist() == [
            [plan[1] + [-1] * (width - len(plan[1])) for plan in of_sequence] for of_sequence in plans
        ]
        assert num_misses.tolist() == [[len(plan[1]) for plan in of_sequence] for of_sequence in plans]
        assert self.slot_chunks.tolist() == [[row.chunks for row in rows] for rows in self.rows]
        assert self.last_used.tolist() == [[row.uses for row in rows] for rows in self.rows]
        assert self.has_values.tolist() == [[row.has_values for row in rows] for rows in self.rows]


def choose(number: random.Random, num_chunks: int, width: int, ascending: bool) -> list[int]:
    """Some distinct chunks; -1 behind them, or anywhere."""
    chosen = number.sample(range(num_chunks), min(num_chunks, number.choice([width, number.randint(0, width)])))
    if ascending:
        return sorted(chosen) + [-1] * (width - len(chosen))
    chosen += [-1] * (width - len(chosen))
    number.shuffle(chosen)
    return chosen


@BACKENDS
@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize(("num_chunks", "width", "num_slots"), [(1, 1, 1), (20, 7, 7), (200, 63, 90)])
def test_steps(
    backend: str, ascending: bool, num_chunks: int, width: int, num_slots: int, device: torch.device
) -> None:
    number = random.Random(num_chunks)
    state = State(backend, 2, 1, num_slots, device)
    for step in range(1, 5):
        chosen = [[choose(number, num_chunks, width, ascending)] for _ in range(2)]
        state.check_step(chosen, step)
        state.fetch(number)


@BACKENDS
def test_many_slots(backend: str, device: torch.device) -> None:
    number = random.Random(0)
    state = State(backend, 1, 1, 1100, device)
    for step in range(1, 4):
        state.check_step([[choose(number, 3000, 989, True)]], step)


@BACKENDS
def test_nothing_and_the_same_again(backend: str, device: torch.device) -> None:
    state = State(backend, 1, 2, 6, device)
    chosen = [[[4, 9, 11, -1], [0, 1, 2, 3]]]
    for step in (1, 2):
        state.check_step(chosen, step)
    state.check_step([[[-1] * 4, [-1] * 4]], 3)
    state.check_step([[[12, 13, 14, 15], [0, 3, 7, 8]]], 4)


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 12), st.integers(0, 6), st.booleans())
def test_reference_on_anything(number: random.Random, width: int, extra: int, ascending: bool) -> None:
    state = State("reference", 2, 2, width + extra, torch.device("cpu"))
    for step in range(1, 6):
        chosen = [[choose(number, 2 * width, width, ascending) for _ in range(2)] for _ in range(2)]
        state.check_step(chosen, step)
        state.fetch(number)


@BACKENDS
def test_resident_chunks_do_the_same(backend: str, device: torch.device) -> None:
    num_slots, width, number = 9, 5, random.Random(3)
    resident = ResidentChunks()
    state = State(backend, 1, 2, num_slots, device)
    for step in range(1, 7):
        chosen = [sorted(number.sample(range(20), width)) for _ in range(2)]
        _, _, num_misses = resident.fetch_keys(torch.tensor(chosen), num_slots, lambda chunks: chunks[..., None, None])
        slots, misses = (poisoned(1, 2, width, dtype=torch.int32, device=device) for _ in range(2))
        counts = poisoned(1, 2, dtype=torch.int32, device=device)
        asked = torch.tensor([chosen], dtype=torch.int32, device=device)
        now = torch.tensor([step], dtype=torch.int32, device=device)
        state.plan_chunks(asked, state.slot_chunks, state.last_used, state.has_values, now, slots, misses, counts)
        assert int(counts.sum()) == num_misses
        for head in (0, 1):
            assert sorted(state.slot_chunks[0, head].tolist()) == sorted(resident.tensors[0][head].tolist())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize(("width", "num_slots"), [(768, 1024), (3072, 4096), (4096, 4096)])
def test_large_plans(backend: str, width: int, num_slots: int, device: torch.device) -> None:
    number = random.Random(width)
    state = State(backend, 2, 2, num_slots, device)
    for step in range(1, 4):
        state.check_step([[choose(number, 15_250, width, True) for _ in range(2)] for _ in range(2)], step)


def test_more_slots_than_a_block_holds_go_to_the_next_backend(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: torch.device
) -> None:
    monkeypatch.setattr(cuda_kernel, "MAXIMUM_SLOTS", 5)
    state = State(backend, 1, 2, 6, device)
    state.plan_chunks = cuda_kernel.plan_chunks
    state.check_step([[[4, 9, 11, -1], [0, 1, 2, 3]]], 1)


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
def test_too_few_slots_are_refused(backend: str, device: torch.device) -> None:
    state = State(backend, 1, 1, 3, device)
    with pytest.raises(ValueError, match="a slot for each of the 4 chosen chunks, not 3"):
        state.check_step([[[1, 2, 3, 4]]], 1)


def test_opcheck(device: torch.device) -> None:
    state = State("reference", 2, 2, 6, device)
    chosen = torch.tensor([[[1, 2, 3], [4, 5, -1]]] * 2, dtype=torch.int32, device=device)
    out = [torch.zeros_like(chosen) for _ in range(2)]
    arguments = (
        chosen,
        state.slot_chunks,
        state.last_used,
        state.has_values,
        torch.ones(1, dtype=torch.int32, device=device),
        *out,
        torch.zeros(2, 2, dtype=torch.int32, device=device),
    )
    torch.library.opcheck(torch.ops.longshadow.plan_chunks.default, arguments)


def test_it_compiles_for_every_device() -> None:
    check_that_it_compiles("plan_chunks", "768 of 1024")
