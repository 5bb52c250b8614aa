"""Resident chunks against the rule of least recent use, and values that are fetched once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.shadowkv.resident import ResidentChunks

NUM_CHUNKS, CHUNK_SIZE = 12, 3
HEADS = torch.arange(2).unsqueeze(1)


def keys_of(chunks: torch.Tensor) -> torch.Tensor:
    """A key says which head, chunk and place it belongs to: [H, m, c, 1]."""
    places = chunks.unsqueeze(2) * CHUNK_SIZE + torch.arange(CHUNK_SIZE)
    return (places + 100 * HEADS.unsqueeze(2)).float().unsqueeze(3)


def values_of(tokens: torch.Tensor) -> torch.Tensor:
    return -(tokens + 100 * HEADS).float().unsqueeze(2)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.permutations(range(NUM_CHUNKS)), min_size=2, max_size=2), min_size=1, max_size=10),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_only_the_longest_unused_leave(orders, num_candidates, extra, every_token, random) -> None:
    resident = ResidentChunks()
    held: list[set[int]] = [set(), set()]
    fetched: list[set[int]] = [set(), set()]
    last_use: list[dict[int, int]] = [{}, {}]
    for step, order in enumerate(orders):
        asked = torch.tensor([row[:num_candidates] for row in order])
        keys, candidates, num_misses = resident.fetch_keys(asked, num_candidates + extra, keys_of)
        assert torch.equal(candidates.sort(1).values, asked.sort(1).values)
        assert torch.equal(keys, keys_of(candidates))
        wanted = [set(row) for row in asked.tolist()]
        assert num_misses == sum(len(wanted[head] - held[head]) for head in (0, 1))
        slots = resident.tensors[0].tolist()
        for head in (0, 1):
            now = {chunk for chunk in slots[head] if chunk >= 0}
            assert wanted[head] <= now <= wanted[head] | held[head] and len(slots[head]) == num_candidates + extra
            for gone in held[head] - now:
                assert all(last_use[head][gone] <= last_use[head][kept] for kept in now - wanted[head])
            fetched[head] -= {token for token in fetched[head] if token // CHUNK_SIZE in wanted[head] - held[head]}
            held[head] = now
            last_use[head].update(dict.fromkeys(wanted[head], step))

        num_places = num_candidates * CHUNK_SIZE
        num_tokens = num_places if every_token else random.randint(1, num_places)
        places = torch.tensor([random.sample(range(num_places), num_tokens) for _ in (0, 1)])
        if every_token:
            places = torch.arange(num_places).expand(2, -1)
        tokens = candidates.gather(1, places // CHUNK_SIZE) * CHUNK_SIZE + places % CHUNK_SIZE
        loaded: list[torch.Tensor] = []

        def load(missing: torch.Tensor, loaded: list[torch.Tensor] = loaded) -> torch.Tensor:
            loaded.append(missing)
            return values_of(missing)

        values = resident.fetch_values(None if every_token else places, tokens, load)
        assert torch.equal(values, values_of(tokens))
        missing = [set(tokens[head].tolist()) - fetched[head] for head in (0, 1)]
        assert (loaded[0].shape[1] if loaded else 0) == max(map(len, missing)), "only what is missing is fetched"
        for head in (0, 1):
            assert not loaded or missing[head] <= set(loaded[0][head].tolist())
            fetched[head] |= set(tokens[head].tolist())


def test_growing_keeps_what_is_resident() -> None:
    resident = ResidentChunks()
    resident.fetch_keys(torch.tensor([[1, 2], [1, 2]]), 2, keys_of)
    resident.fetch_values(torch.tensor([[0], [5]]), torch.tensor([[3], [8]]), values_of)
    chunks = torch.tensor([[2, 7, 1], [2, 7, 1]])
    keys, candidates, num_misses = resident.fetch_keys(chunks, 4, keys_of)
    assert num_misses == 2 and torch.equal(keys, keys_of(candidates))
    tokens = torch.tensor([[3], [8]])
    places = (candidates == tokens // CHUNK_SIZE).int().argmax(1, keepdim=True) * CHUNK_SIZE + tokens % CHUNK_SIZE
    loaded: list[torch.Tensor] = []
    values = resident.fetch_values(places, tokens, lambda missing: loaded.append(missing) or values_of(missing))
    assert not loaded and torch.equal(values, values_of(tokens))
