"""Attention over selected tokens and regions: the reference against the cache's own in fp64, kernels against both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.ops.backend import implementation
from longshadow.engine.ops.sparse_attention import sparse_attention_workspace
from longshadow.engine.shadowkv.exact import AttentionParameters, attend_parts, attention_logits
from tests.engine.ops.batches import Batch, random_batch
from tests.engine.ops.checks import DTYPES, assert_as_exact, check_that_it_compiles, poisoned
from tests.engine.ops.slots import RandomSlots

pytestmark = pytest.mark.usefixtures("few_parts")
SCALING = 0.2


def attend(
    backend: str,
    batch: Batch,
    query: torch.Tensor,
    slots: RandomSlots,
    places: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp."""
    out = poisoned(*query.shape[:3], batch.value_dim, dtype=batch.dtype, device=batch.device)
    lse = poisoned(*query.shape[:3], dtype=torch.float32, device=batch.device)
    size = sparse_attention_workspace(*query.shape[:3], batch.value_dim, places.shape[2])
    workspace = poisoned(size, dtype=torch.float32, device=batch.device)
    run = implementation("sparse_attention", backend, batch.device)
    tables = (places, slots.keys, slots.values, batch.table.regions)
    run(query, *tables, sinks, SCALING, softcap, out, lse, workspace)
    return out, lse


def expected_attention(
    batch: Batch,
    query: torch.Tensor,
    slots: RandomSlots,
    places: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in fp64 by the functions of `exact`, of what the sequences hold; nothing to attend to gives 0."""
    out = torch.zeros(*query.shape[:3], batch.value_dim, dtype=torch.float64, device=batch.device)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64, device=batch.device)
    for index, (segments, tail) in enumerate(zip(batch.segments, batch.tails, strict=True)):
        exact = [*((segment.exact_keys, segment.exact_values) for segment in segments), (tail.keys, tail.values)]
        for head in range(query.shape[1]):
            own = places[index, head][places[index, head] >= 0]
            parts = [(slots.keys[index, head].flatten(0, 1)[own], slots.values[index, head].flatten(0, 1)[own])]
            parts += [(keys[head], values[head]) for keys, values in exact]
            parts = [(keys.double().unsqueeze(0), values.double().unsqueeze(0)) for keys, values in parts]
            sink = None if sinks is None else sinks[head].double()
            parameters = AttentionParameters(scaling=SCALING, softcap=softcap or None, sinks=sink)
            vectors = query[index, head : head + 1].double()
            logits = torch.cat([attention_logits(vectors, keys, parameters) for keys, _ in parts], 2)
            if sink is not None:
                logits = torch.cat([logits, sink.view(1, -1, 1)], 2)
            if logits.shape[2]:
                out[index, head] = attend_parts(vectors, parts, parameters)[0]
                lse[index, head] = logits.logsumexp(2)[0]
    return out, lse


def check(
    backend: str,
    batch: Batch,
    query: torch.Tensor,
    slots: RandomSlots,
    places: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> None:
    expected = expected_attention(batch, query, slots, places, sinks=sinks, softcap=softcap)
    reference = attend("reference", batch, query, slots, places, sinks=sinks, softcap=softcap)
    results = attend(backend, batch, query, slots, places, sinks=sinks, softcap=softcap)
    # Weights are exponentials: they are off by as much as logits of ten and more are, in fp32.
    tolerance = max(4 * torch.finfo(batch.dtype).eps, 1e-5)
    assert torch.allclose(reference[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    assert torch.allclose(reference[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    for result, own_reference, own_expected in zip(results, reference, expected, strict=True):
        assert_as_exact(result, own_reference, own_expected, absolute=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 7, 8])
def test_places_and_regions_share_one_softmax(
    chunk_size: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    batch = random_batch(
        [[5, 1, 9], [], [12]], tails=[70, 1, 0], chunk_size=chunk_size, value_dim=64, dtype=dtype, device=device
    )
    slots = RandomSlots(batch, num_slots=90 // chunk_size, num_candidates=[80 // chunk_size, 0, 7])
    check(backend, batch, batch.query(4), slots, slots.places([63, 0, 7]))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (192, 128), (256, 256), (32, 256)])
def test_head_dims(key_dim: int, value_dim: int, backend: str, device: torch.device) -> None:
    batch = random_batch(
        [[5]],
        tails=[21],
        key_dim=key_dim,
        value_dim=value_dim,
        num_kv_heads=1,
        dtype=torch.float16,
        device=device,
    )
    slots = RandomSlots(batch, num_slots=9, num_candidates=[7])
    check(backend, batch, batch.query(2), slots, slots.places([41]))


@pytest.mark.parametrize("group", [1, 3, 16])
def test_groups_and_sinks(group: int, backend: str, device: torch.device) -> None:
    batch = random_batch([[5]], tails=[21], num_kv_heads=3, device=device)
    slots = RandomSlots(batch, num_slots=9, num_candidates=[6])
    sinks = torch.linspace(-3, 3, 3 * group, device=device).view(3, group)
    check(backend, batch, batch.query(group), slots, slots.places([41]), sinks=sinks)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap: float, backend: str, device: torch.device) -> None:
    batch = random_batch([[5]], tails=[21], device=device)
    slots = RandomSlots(batch, num_slots=9, num_candidates=[6])
    check(backend, batch, batch.query(4), slots, slots.places([41]), softcap=softcap)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_nothing_to_attend_to(with_sinks: bool, backend: str, device: torch.device) -> None:
    batch = random_batch([[], [3]], num_sink_chunks=0, num_outlier_chunks=0, device=device)
    slots = RandomSlots(batch, num_slots=9, num_candidates=[0, 2])
    sinks = torch.ones(2, 4, device=device) if with_sinks else None
    check(backend, batch, batch.query(4), slots, slots.places([0, 5]), sinks=sinks)


def test_without_places(backend: str, device: torch.device) -> None:
    batch = random_batch([[3]], tails=[5], device=device)
    slots = RandomSlots(batch, num_slots=9, num_candidates=[1])
    check(backend, batch, batch.query(4), slots, slots.places([0]))


def test_a_long_tail_takes_all_parts(backend: str, device: torch.device) -> None:
    batch = random_batch([[3]], tails=[989], num_kv_heads=1, device=device)
    slots = RandomSlots(batch, num_slots=2, num_candidates=[1])
    check(backend, batch, batch.query(2), slots, slots.places([1]))


def test_large_logits_do_not_overflow(backend: str, device: torch.device) -> None:
    batch = random_batch([[5]], tails=[21], device=device)
    slots = RandomSlots(batch, num_slots=9, num_candidates=[6])
    check(backend, batch, 1000 * batch.query(4), slots, slots.places([41]))


@settings(max_examples=6, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=2),
    tails=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    tokens=st.tuples(st.integers(0, 88), st.integers(0, 88)),
    group=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_ragged_sequences(
    backend: str,
    device: torch.device,
    chunks: list[list[int]],
    tails: tuple[int, int],
    tokens: tuple[int, int],
    group: int,
    seed: int,
) -> None:
    size = len(chunks)
    batch = random_batch(chunks, tails=tails[:size], num_kv_heads=1, rank=2, device=device, seed=seed)
    slots = RandomSlots(batch, num_slots=12, num_candidates=[-(-count // 8) for count in tokens[:size]])
    check(backend, batch, batch.query(group), slots, slots.places(tokens[:size]))


def test_operator_is_registered(device: torch.device) -> None:
    batch = random_batch([[7, 1], []], tails=[3, 4], device=device)
    query, slots = batch.query(2), RandomSlots(batch, num_slots=5, num_candidates=[4, 2])
    places, sinks = slots.places([9, 3]), torch.zeros(2, 2, device=device)
    out, lse = torch.zeros(2, 2, 2, 32, device=device), torch.zeros(2, 2, 2, device=device)
    workspace = torch.zeros(sparse_attention_workspace(2, 2, 2, 32, 9), device=device)
    # opcheck compares what it writes, and NaN in the unused slots is unequal to itself.
    stored = (slots.keys.nan_to_num(), slots.values.nan_to_num())
    arguments = (query, places, *stored, batch.table.regions, sinks, SCALING, 0.0, out, lse, workspace)
    torch.library.opcheck(torch.ops.longshadow.sparse_attention, arguments)
    torch.ops.longshadow.sparse_attention(*arguments)
    expected, _ = expected_attention(batch, query, slots, places, sinks=sinks)
    assert torch.allclose(out, expected.float(), rtol=1e-4, atol=1e-6)


def test_kernels_compile_ahead_of_time() -> None:
    check_that_it_compiles("sparse_attention", "parts bf16 4 x 32, 32")
