"""The leading eigenvectors against a full decomposition, and what happens where they do not settle."""

import pytest
import torch

from longshadow.compress.krylov import OVERSAMPLING, is_worthwhile, leading_eigenvectors


def matrix(eigenvalues: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double()).Q
    return vectors @ torch.diag(eigenvalues) @ vectors.T


def start_of(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(300, count + OVERSAMPLING, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "eigenvalues",
    [
        torch.logspace(0, -8, 300),
        1 / torch.arange(1, 301),
        torch.cat([torch.tensor([1e9]), torch.linspace(1, 0.1, 299)]),
        torch.cat([torch.ones(3), torch.zeros(297)]),
        torch.zeros(300),
    ],
    ids=["steep", "slow", "one massive", "rank below r", "zero"],
)
def test_they_capture_what_the_exact_ones_do(eigenvalues: torch.Tensor) -> None:
    gram = matrix(eigenvalues.double())
    vectors = leading_eigenvectors(lambda block: gram @ block, start_of(5), 5)
    assert vectors is not None
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)
    captured = (vectors.T @ gram @ vectors).diagonal()
    expected = torch.linalg.eigvalsh(gram).flip(0)[:5]
    # Rounding of the largest hides the smallest.
    torch.testing.assert_close(captured, expected, rtol=1e-5, atol=1e-12 * float(expected.max()))


def test_none_where_they_do_not_settle() -> None:
    """Each step meets a new direction of the same size: a shift of the coordinates, which has no leading ones."""
    steps = iter(range(1, 100))
    grown = leading_eigenvectors(lambda block: next(steps) * block.roll(1, 0), start_of(1), 1)
    assert grown is None


def test_small_matrices_are_not_worth_it() -> None:
    assert is_worthwhile(2048, 32) and not is_worthwhile(576, 32)
