"""Landmark scores: the reference against the cache's own selection in fp64, kernels against both."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.ops.backend import implementation
from longshadow.engine.ops.score_chunks import score_chunks_workspace
from longshadow.engine.ops.tables import RowKind
from longshadow.engine.shadowkv import selection
from longshadow.engine.shadowkv.storage import RowStore
from tests.engine.ops.batches import Batch, random_batch, unpacked
from tests.engine.ops.checks import DTYPES, assert_as_exact, check_that_it_compiles, poisoned

pytestmark = pytest.mark.usefixtures("few_parts")
RAGGED = [[7, 1, 63], [], [40]]


def score(
    backend: str, batch: Batch, query: torch.Tensor, *, softcap: float = 0.0, extra: int = 3, scaling: float = 0.2
) -> torch.Tensor:
    """Scores with `extra` places more than the longest sequence has chunks."""
    sizes = (*query.shape[:3], max(batch.num_chunks) + extra)
    scores = poisoned(*sizes[:2], sizes[3], dtype=torch.float32, device=batch.device)
    workspace = poisoned(score_chunks_workspace(*sizes), dtype=torch.float32, device=batch.device)
    run = implementation("score_chunks", backend, batch.device)
    run(query, batch.table.segments, scaling, softcap, batch.table.factors, scores, workspace)
    return scores


def expected_scores(
    batch: Batch, query: torch.Tensor, *, softcap: float = 0.0, extra: int = 3, scaling: float = 0.2
) -> torch.Tensor:
    """The same in fp64 by `selection.score_chunks`."""
    shape = (*query.shape[:2], max(batch.num_chunks) + extra)
    scores = torch.full(shape, -torch.inf, dtype=torch.float64, device=batch.device)
    for own, segments, num_chunks in zip(scores, batch.segments, batch.num_chunks, strict=True):
        if not segments:
            continue
        precise = [dataclasses.replace(piece, landmarks=RowStore(unpacked(piece.landmarks))) for piece in segments]
        index = batch.segments.index(segments)
        own[:, :num_chunks] = selection.score_chunks(query[index].double(), precise, scaling, softcap or None)
    return scores


def check(backend: str, batch: Batch, query: torch.Tensor, *, softcap: float = 0.0, extra: int = 3) -> None:
    expected = expected_scores(batch, query, softcap=softcap, extra=extra)
    reference = score("reference", batch, query, softcap=softcap, extra=extra)
    assert_as_exact(reference, reference, expected)
    assert torch.allclose(reference.double(), expected, rtol=1e-4, atol=1e-6)
    assert_as_exact(score(backend, batch, query, softcap=softcap, extra=extra), reference, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", RowKind)
def test_kinds_of_rows(kind: RowKind, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    batch = random_batch(RAGGED, factors=kind, dtype=dtype, device=device)
    check(backend, batch, batch.query(4))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 192, 256])
def test_head_dims(head_dim: int, backend: str, device: torch.device) -> None:
    batch = random_batch(
        [[7, 1], [33]], key_dim=head_dim, value_dim=32, num_kv_heads=1, dtype=torch.float16, device=device
    )
    check(backend, batch, batch.query(2))


@pytest.mark.parametrize("group", [1, 3, 16])
def test_groups(group: int, backend: str, device: torch.device) -> None:
    batch = random_batch([[7, 40]], num_kv_heads=3, device=device)
    check(backend, batch, batch.query(group))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap: float, backend: str, device: torch.device) -> None:
    batch = random_batch([[70]], device=device)
    check(backend, batch, batch.query(4), softcap=softcap)


def test_every_chunk_is_exact(backend: str, device: torch.device) -> None:
    batch = random_batch([[7, 1], [70]], num_sink_chunks=40, num_outlier_chunks=40, device=device)
    scores = score(backend, batch, batch.query(4))
    assert scores.eq(-torch.inf).all()


def test_every_chunk_of_one_segment_is_exact(backend: str, device: torch.device) -> None:
    batch = random_batch([[3, 30], [30, 3]], num_sink_chunks=1, num_outlier_chunks=2, device=device)
    check(backend, batch, batch.query(4))


def test_no_chunk_is_exact(backend: str, device: torch.device) -> None:
    batch = random_batch([[3, 30]], num_sink_chunks=0, num_outlier_chunks=0, device=device)
    check(backend, batch, batch.query(4))


def test_many_exact_chunks(backend: str, device: torch.device) -> None:
    batch = random_batch([[150]], num_kv_heads=1, num_sink_chunks=3, num_outlier_chunks=80, device=device)
    check(backend, batch, batch.query(2))


def test_sequences_share_a_segment(backend: str, device: torch.device) -> None:
    batch = random_batch([[40, 3], [40], [40, 1, 5]], share_first=True, device=device)
    check(backend, batch, batch.query(4))


def test_large_logits_do_not_overflow(backend: str, device: torch.device) -> None:
    batch = random_batch([[70]], device=device)
    check(backend, batch, 1000 * batch.query(4))


@settings(max_examples=6, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(1, 40), max_size=3), min_size=1, max_size=2),
    sinks=st.integers(0, 2),
    outliers=st.integers(0, 9),
    group=st.integers(1, 5),
    extra=st.integers(0, 70),
    seed=st.integers(0, 1000),
)
def test_ragged_sequences(
    backend: str,
    device: torch.device,
    chunks: list[list[int]],
    sinks: int,
    outliers: int,
    group: int,
    extra: int,
    seed: int,
) -> None:
    counts = dict(num_kv_heads=1, num_sink_chunks=sinks, num_outlier_chunks=outliers, rank=2)
    batch = random_batch(chunks, **counts, device=device, seed=seed)
    check(backend, batch, batch.query(group), extra=extra)


def test_operator_is_registered(device: torch.device) -> None:
    batch = random_batch([[7, 1], [9]], device=device)
    query = batch.query(2)
    scores = torch.zeros(2, 2, 9, device=device)
    workspace = torch.zeros(score_chunks_workspace(2, 2, 2, 9), device=device)
    arguments = (query, batch.table.segments, 0.2, 0.0, int(RowKind.MODEL), scores, workspace)
    torch.library.opcheck(torch.ops.longshadow.score_chunks, arguments)
    torch.ops.longshadow.score_chunks(*arguments)
    assert torch.allclose(scores, expected_scores(batch, query, extra=0).float(), rtol=1e-4, atol=1e-6)


def test_kernels_compile_ahead_of_time() -> None:
    check_that_it_compiles("score_chunks", "parts bf16 model 4 x 32")
