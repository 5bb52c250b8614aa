"""Resident chunks against the rule of least recent use."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.shadowkv.resident import ResidentChunks

NUM_CHUNKS = 12


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.permutations(range(NUM_CHUNKS)), min_size=2, max_size=2), min_size=1, max_size=10),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_only_the_longest_unused_leave(orders: list[list[list[int]]], num_selected: int, extra: int) -> None:
    chunks = torch.arange(2 * NUM_CHUNKS * 3.0).view(2, NUM_CHUNKS, 3, 1)  # [H, chunks, c, D]
    heads = torch.arange(2).unsqueeze(1)
    resident = ResidentChunks()
    held: list[set[int]] = [set(), set()]
    last_use: list[dict[int, int]] = [{}, {}]
    for step, order in enumerate(orders):
        selected = torch.tensor([row[:num_selected] for row in order])
        keys, values, num_misses = resident.fetch(
            selected, num_selected + extra, lambda wanted: (chunks[heads, wanted], -chunks[heads, wanted])
        )
        expected = chunks[heads, selected].flatten(1).sort(1).values
        assert torch.equal(keys.flatten(1).sort(1).values, expected) and torch.equal(values, -keys)
        wanted = [set(row) for row in selected.tolist()]
        assert num_misses == sum(len(wanted[head] - held[head]) for head in (0, 1))
        slots = resident.tensors[0].tolist()
        for head in (0, 1):
            now = {chunk for chunk in slots[head] if chunk >= 0}
            assert wanted[head] <= now <= wanted[head] | held[head] and len(slots[head]) == num_selected + extra
            for gone in held[head] - now:
                assert all(last_use[head][gone] <= last_use[head][kept] for kept in now - wanted[head])
            held[head] = now
            last_use[head].update(dict.fromkeys(wanted[head], step))


def test_only_misses_are_loaded() -> None:
    resident, asked = ResidentChunks(), []

    def load(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(wanted.tolist())
        return torch.zeros(1, wanted.shape[1], 2, 1), torch.zeros(1, wanted.shape[1], 2, 1)

    for selection in ([3, 4], [4, 3], [4, 5]):
        resident.fetch(torch.tensor([selection]), 2, load)
    assert asked == [[[3, 4]], [[5]]]


def test_growing_keeps_what_is_resident() -> None:
    resident = ResidentChunks()
    load = lambda wanted: (wanted.view(1, -1, 1, 1).float(),) * 2  # noqa: E731
    resident.fetch(torch.tensor([[1, 2]]), 2, load)
    keys, _, num_misses = resident.fetch(torch.tensor([[2, 7, 1]]), 4, load)
    assert num_misses == 1 and sorted(keys.flatten().tolist()) == [1, 2, 7]
