"""The iterated subspace against the eigendecomposition, for spectra it finds easy and hard."""

import pytest
import torch

from longshadow.engine.shadowkv.subspace import dominant_subspace

WIDTH = 96
PLACES = torch.arange(1, WIDTH + 1, dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones(WIDTH, dtype=torch.float64),
    "slow": PLACES**-0.25,
    "medium": PLACES**-1.0,
    "steep": PLACES**-4.0,
    "exponential": torch.exp(-PLACES / 4),
    "one massive": torch.cat([torch.tensor([1e8], dtype=torch.float64), PLACES[1:] ** -0.5]),
    "a step": torch.where(PLACES <= 32, 1.0, 0.5).double(),
    "five directions": torch.where(PLACES <= 5, PLACES, 0.0),
    "nothing": torch.zeros(WIDTH, dtype=torch.float64),
}


def matrix_with(spectrum: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).Q
    matrix = (vectors * spectrum) @ vectors.T
    return (matrix + matrix.T) / 2


def check(matrix: torch.Tensor, rank: int, *, tolerance: float = 1e-3) -> None:
    """`tolerance`: of what the eigenvectors keep; of the trace it is 1e-3."""
    subspace = dominant_subspace(matrix, rank)
    largest = torch.linalg.eigvalsh(matrix).flip(0)[:rank].clamp(min=0)
    kept, best = float((subspace.T @ matrix @ subspace).trace()), float(largest.sum())
    assert best - min(tolerance * best, 1e-3 * float(matrix.trace())) <= kept <= (1 + 1e-9) * best
    assert torch.linalg.matrix_norm(subspace, 2) <= 1 + 1e-9


@pytest.mark.parametrize("rank", [1, 7, 32, WIDTH])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_it_keeps_the_largest_eigenvalues(spectrum: str, rank: int) -> None:
    check(matrix_with(SPECTRA[spectrum]), rank)


@pytest.mark.parametrize("rank", [1, 7, 32])
@pytest.mark.parametrize("num_tokens", [5, 96, 1000])
def test_it_keeps_the_energy_of_noise(num_tokens: int, rank: int) -> None:
    keys = torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    check(keys.T @ keys, rank, tolerance=5e-3)


def test_it_is_orthonormal_and_the_same_every_time() -> None:
    matrix = matrix_with(SPECTRA["medium"])
    subspace = dominant_subspace(matrix, 32)
    torch.testing.assert_close(subspace.T @ subspace, torch.eye(32, dtype=torch.float64))
    assert torch.equal(dominant_subspace(matrix, 32), subspace)


def test_what_a_massive_direction_hides_is_found_too() -> None:
    matrix = matrix_with(SPECTRA["one massive"])
    subspace = dominant_subspace(matrix, 32)
    lost = float(matrix.trace() - (subspace.T @ matrix @ subspace).trace())
    assert lost <= 1.05 * float(SPECTRA["one massive"][32:].sum())


def test_tiny_matrices() -> None:
    assert dominant_subspace(torch.full((1, 1), 4.0, dtype=torch.float64), 1).abs().item() == pytest.approx(1)
    assert dominant_subspace(torch.zeros(1, 1, dtype=torch.float64), 1).item() == 0
