"""The largest scores of each row against a plain sort of Python's: every implementation gives exactly these."""

import math
import random

import pytest
import torch

from longshadow.engine.ops.backend import implementation
from tests.engine.ops.checks import check_that_it_compiles, poisoned

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton", "cuda"], indirect=True)
NOT_FINITE = (math.inf, -math.inf, math.nan)


def best(row: list[float], count: int, capacity: int) -> list[int]:
    """Specification, by sorting (score, place) pairs."""
    finite = [place for place, score in enumerate(row) if math.isfinite(score)]
    chosen = sorted(sorted(finite, key=lambda place: (-row[place], place))[:count])
    return chosen + [-1] * (capacity - len(chosen))


def assert_best(backend: str, scores: torch.Tensor, counts: list[int], capacity: int) -> None:
    batch_size, num_heads, _ = scores.shape
    device = scores.device
    chosen = poisoned(batch_size, num_heads, capacity, dtype=torch.int32, device=device)
    operator = implementation("top_chunks", backend, device)
    before = scores.clone()
    operator(scores, torch.tensor(counts, dtype=torch.int32, device=device), chosen)
    expected = [
        [best(row, count, capacity) for row in rows] for rows, count in zip(scores.tolist(), counts, strict=True)
    ]
    assert chosen.tolist() == expected
    assert torch.equal(scores.view(torch.int32), before.view(torch.int32))


@BACKENDS
@pytest.mark.parametrize("num_scores", [1, 7, 63, 989, 4097])
def test_weights_of_a_softmax(backend: str, num_scores: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(num_scores)
    scores = torch.randn(3, 2, num_scores, generator=generator).mul_(3).softmax(-1)
    scores[1, :, num_scores // 3 :: 5] = -math.inf
    scores[2, :, num_scores // 2 :] = -math.inf
    capacity = max(1, num_scores // 3)
    assert_best(backend, scores.to(device), [capacity, capacity // 2, capacity], capacity)


@BACKENDS
def test_equal_scores_go_to_the_lower_places(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(3, (2, 2, 700), generator=generator).float()
    few[1] = 0.25
    few[0, 1, ::2] = -0.0
    few[0, 1, 1::2] = 0.0
    assert_best(backend, few.to(device), [257, 311], 311)


@BACKENDS
def test_numbers_that_are_hard_to_order(backend: str, device: torch.device) -> None:
    smallest, largest = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    denormal = smallest / 2**20
    values = [0.0, -0.0, denormal, -denormal, smallest, -smallest, 1.0, math.nextafter(1.0, 2.0), largest, -largest]
    choices = random.Random(0)
    rows = [[choices.choice([*values, *NOT_FINITE]) for _ in range(301)] for _ in range(3)]
    rows += [[-math.inf] * 301, [math.nan] * 301, [largest] * 301]
    scores = torch.tensor(rows).view(2, 3, 301)
    assert_best(backend, scores.to(device), [17, 150], 150)


@BACKENDS
@pytest.mark.parametrize(("count", "num_finite"), [(0, 9), (9, 9), (9, 8), (5, 0), (1, 9), (8, 9)])
def test_none_all_and_more_than_there_are(backend: str, count: int, num_finite: int, device: torch.device) -> None:
    scores = torch.linspace(-1, 1, 9).repeat(1, 2, 1)
    scores[:, :, num_finite:] = -math.inf
    assert_best(backend, scores.to(device), [count], 12)


@BACKENDS
def test_differences_in_the_last_bits(backend: str, device: torch.device) -> None:
    bits = torch.arange(2000, dtype=torch.int32) * 3 + torch.tensor(0.125).view(torch.int32)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    scores = bits[order].view(torch.float32).view(1, 1, 2000)
    for count in (1, 341, 342, 1024, 1999):
        assert_best(backend, scores.to(device), [count], 2000)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize("num_scores", [15_250, 20_000, 21_001, 131_072])
def test_long_rows(backend: str, num_scores: int, device: torch.device) -> None:
    scores = torch.randn(2, 3, num_scores, device=device).mul_(3).softmax(-1)
    scores[:, :, ::7] = -math.inf
    assert_best(backend, scores, [4096, 1000], 4096)


def test_opcheck(device: torch.device) -> None:
    scores = torch.rand(2, 3, 40, device=device)
    counts = torch.tensor([3, 5], dtype=torch.int32, device=device)
    chosen = torch.zeros(2, 3, 5, dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.longshadow.top_chunks.default, (scores, counts, chosen))


def test_it_compiles_for_every_device() -> None:
    check_that_it_compiles("top_chunks", "any")
