"""Attention weights of candidate tokens: the reference against the cache's own in fp64, kernels against both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.ops.backend import implementation
from longshadow.engine.ops.score_tokens import score_tokens_workspace
from longshadow.engine.shadowkv.exact import AttentionParameters, attention_logits, attention_weights
from tests.engine.ops.batches import Batch, random_batch
from tests.engine.ops.checks import DTYPES, assert_as_exact, check_that_it_compiles, poisoned
from tests.engine.ops.slots import RandomSlots

pytestmark = pytest.mark.usefixtures("few_parts")
SCALING = 0.2


def score(
    backend: str,
    batch: Batch,
    query: torch.Tensor,
    candidates: RandomSlots,
    *,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    num_tokens = candidates.slots.shape[2] * batch.chunk_size
    scores = poisoned(*query.shape[:2], num_tokens, dtype=torch.float32, device=batch.device)
    workspace = poisoned(score_tokens_workspace(*query.shape[:3], num_tokens), dtype=torch.float32, device=batch.device)
    run = implementation("score_tokens", backend, batch.device)
    run(query, candidates.slots, candidates.keys, batch.table.regions, sinks, SCALING, softcap, scores, workspace)
    return scores


def expected_scores(
    batch: Batch,
    query: torch.Tensor,
    candidates: RandomSlots,
    *,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The same in fp64 by the functions of `exact`, of what the sequences hold."""
    parameters = AttentionParameters(
        scaling=SCALING, softcap=softcap or None, sinks=None if sinks is None else sinks.double().flatten()
    )
    scores = torch.full((*query.shape[:2], candidates.slots.shape[2] * batch.chunk_size), -torch.inf).double()
    scores = scores.to(batch.device)
    for index, (segments, tail) in enumerate(zip(batch.segments, batch.tails, strict=True)):
        exact = [*(segment.exact_keys for segment in segments), tail.keys]
        for head in range(query.shape[1]):
            own = candidates.slots[index, head]
            keys = candidates.keys[index, head, own[own >= 0]].flatten(0, 1).unsqueeze(0)
            pieces = [keys, *(piece[head : head + 1] for piece in exact)]
            logits = [
                attention_logits(query[index, head : head + 1].double(), piece.double(), parameters) for piece in pieces
            ]
            one = AttentionParameters(scaling=SCALING, sinks=None if sinks is None else sinks[head].double())
            weights = attention_weights(logits, one)[0].amax(1)[0]
            scores[index, head, (own >= 0).repeat_interleave(batch.chunk_size)] = weights
    return scores


def check(
    backend: str,
    batch: Batch,
    query: torch.Tensor,
    candidates: RandomSlots,
    *,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> None:
    expected = expected_scores(batch, query, candidates, sinks=sinks, softcap=softcap)
    reference = score("reference", batch, query, candidates, sinks=sinks, softcap=softcap)
    assert torch.allclose(reference.double(), expected, rtol=1e-4, atol=1e-6)
    result = score(backend, batch, query, candidates, sinks=sinks, softcap=softcap)
    assert_as_exact(result, reference, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 7, 8])
def test_candidates_and_regions_share_one_softmax(
    chunk_size: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    batch = random_batch([[5, 1, 9], [], [12]], tails=[70, 1, 0], chunk_size=chunk_size, dtype=dtype, device=device)
    check(backend, batch, batch.query(4), RandomSlots(batch, num_slots=20, num_candidates=[13, 0, 4]))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 192, 256])
def test_head_dims(head_dim: int, backend: str, device: torch.device) -> None:
    batch = random_batch(
        [[5]], tails=[21], key_dim=head_dim, value_dim=32, num_kv_heads=1, dtype=torch.float16, device=device
    )
    check(backend, batch, batch.query(2), RandomSlots(batch, num_slots=9, num_candidates=[9]))


@pytest.mark.parametrize("group", [1, 3, 16])
def test_groups_and_sinks(group: int, backend: str, device: torch.device) -> None:
    batch = random_batch([[5]], tails=[21], num_kv_heads=3, device=device)
    sinks = torch.linspace(-3, 3, 3 * group, device=device).view(3, group)
    check(backend, batch, batch.query(group), RandomSlots(batch, num_slots=9, num_candidates=[6]), sinks=sinks)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap: float, backend: str, device: torch.device) -> None:
    batch = random_batch([[5]], tails=[21], device=device)
    candidates = RandomSlots(batch, num_slots=9, num_candidates=[6])
    check(backend, batch, batch.query(4), candidates, softcap=softcap)


def test_without_regions(backend: str, device: torch.device) -> None:
    batch = random_batch([[], []], device=device)
    check(backend, batch, batch.query(4), RandomSlots(batch, num_slots=9, num_candidates=[6, 0]))


def test_a_long_tail_outweighs_the_candidates(backend: str, device: torch.device) -> None:
    batch = random_batch([[3]], tails=[989], num_kv_heads=1, device=device)
    check(backend, batch, batch.query(2), RandomSlots(batch, num_slots=2, num_candidates=[1]))


def test_large_logits_do_not_overflow(backend: str, device: torch.device) -> None:
    batch = random_batch([[5]], tails=[21], device=device)
    check(backend, batch, 1000 * batch.query(4), RandomSlots(batch, num_slots=9, num_candidates=[6]))


@settings(max_examples=6, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=2),
    tails=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    candidates=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    group=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_ragged_sequences(
    backend: str,
    device: torch.device,
    chunks: list[list[int]],
    tails: tuple[int, int],
    candidates: tuple[int, int],
    group: int,
    seed: int,
) -> None:
    size = len(chunks)
    batch = random_batch(chunks, tails=tails[:size], num_kv_heads=1, rank=2, device=device, seed=seed)
    check(backend, batch, batch.query(group), RandomSlots(batch, num_slots=11, num_candidates=candidates[:size]))


def test_operator_is_registered(device: torch.device) -> None:
    batch = random_batch([[7, 1], []], tails=[3, 4], device=device)
    query, candidates = batch.query(2), RandomSlots(batch, num_slots=5, num_candidates=[4, 2])
    sinks = torch.zeros(2, 2, device=device)
    scores = torch.zeros(2, 2, 32, device=device)
    workspace = torch.zeros(score_tokens_workspace(2, 2, 2, 32), device=device)
    arguments = (
        query, candidates.slots, candidates.keys, batch.table.regions, sinks, SCALING, 0.0, scores, workspace
    )  # fmt: skip
    torch.library.opcheck(torch.ops.longshadow.score_tokens, arguments)
    torch.ops.longshadow.score_tokens(*arguments)
    expected = expected_scores(batch, query, candidates, sinks=sinks)
    assert torch.allclose(scores, expected.float(), rtol=1e-4, atol=1e-6)


def test_kernels_compile_ahead_of_time() -> None:
    check_that_it_compiles("score_tokens", "parts bf16 4 x 32 c=8")
