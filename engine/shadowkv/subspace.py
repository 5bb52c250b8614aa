"""The subspace of a matrix's largest eigenvalues without its eigenvectors, in products that a GPU is good at.

Legend: W width of the matrix, r rank.
"""

import torch

# Largest degree of the polynomials. With three of them, of degree 7, even the spectrum of noise is good to 0.1 %.
DEGREE = 7
# The polynomial's largest value at an eigenvalue. Round-off in the direction of that eigenvalue grows as much, and
# the decomposition after the round must still tell the smallest directions from it.
LARGEST_GAIN = 1e9
# Added to the unit diagonal before a Cholesky decomposition: above its rounding in fp64.
SHIFT = 1e-12
# In place of a divisor of 0.
TINY = 1e-290


def dominant_subspace(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Q [W, r], orthonormal, whose trace(Q^T A Q) is the sum of A's r largest eigenvalues but for 0.1 % of trace(A).

    `matrix` [W, W]: symmetric, positive semi-definite, fp64. Subspace iteration from a fixed random start, filtered
    by Chebyshev polynomials that are small on the interval from 0 to the smallest Ritz value (Zhou, Saad, Tiago and
    Chelikowsky, 2006). Where A has fewer than r eigenvalues above rounding, the other columns are arbitrary or zero.
    The host waits for nothing. On a GPU decompositions take most of the time, so there are few of them.
    """
    assert matrix.dtype == torch.float64
    generator = torch.Generator(matrix.device).manual_seed(0)
    start = torch.randn(matrix.shape[0], rank, generator=generator, device=matrix.device, dtype=matrix.dtype)
    subspace = _orthonormal(matrix @ start)
    subspace = _orthonormal(_orthonormal(_filter(matrix, subspace)))
    # By now the columns are ordered by eigenvalue, and a filtered one is nearly orthogonal to those before it.
    subspace = _orthonormal(_filter(matrix, subspace))
    return _orthonormal(_orthonormal(_filter(matrix, subspace)))


def _filter(matrix: torch.Tensor, subspace: torch.Tensor) -> torch.Tensor:
    """T(2 A / b - 1) Q for the smallest Ritz value b and the largest Chebyshev polynomial T with an acceptable gain."""
    images = matrix @ subspace
    ritz = (subspace * images).sum(0) / subspace.square().sum(0).clamp_(min=TINY)
    edge = ritz.amin().clamp_(min=1e-14 * matrix.trace() + TINY)
    gain = 4 * ritz.amax() / edge
    previous, current = subspace, images * (2 / edge) - subspace
    for degree in range(2, DEGREE + 1):
        following = (matrix @ current).mul_(4 / edge).sub_(current, alpha=2).sub_(previous)
        accepted = gain**degree < LARGEST_GAIN
        previous, current = torch.where(accepted, current, previous), torch.where(accepted, following, current)
    return current


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Columns [W, r], orthonormal unless they depend on each other, by a Cholesky QR decomposition.

    Of columns that depend on earlier ones the part that does not comes out, too short and inexact: once more makes
    them orthonormal (shifted Cholesky QR, Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa, 2020).
    """
    columns = columns / columns.norm(dim=0).clamp_(min=TINY)
    products = columns.T @ columns
    products.diagonal().add_(SHIFT)
    factor = torch.linalg.cholesky_ex(products).L
    orthonormal: torch.Tensor = torch.linalg.solve_triangular(factor.T, columns, upper=True, left=False)
    return orthonormal
