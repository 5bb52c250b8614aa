"""The leading eigenvectors of a large symmetric matrix that is only ever applied (block Krylov, arXiv 1504.05477).

Legend: m size of the matrix, r eigenvectors asked for, b = r + 8 columns of a block.
"""

from collections.abc import Callable

import torch

OVERSAMPLING = 8
MAXIMUM_STEPS = 16
# The share by which one more step may still raise any of the leading eigenvalues, and the largest one's rounding.
TOLERANCE = 1e-5
ROUNDING = 1e-13


def is_worthwhile(size: int, count: int) -> bool:
    """Whether the space that the steps may span is small beside the whole, so that a full decomposition is dearer."""
    return MAXIMUM_STEPS * (count + OVERSAMPLING) <= size


def leading_eigenvectors(
    apply: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, count: int
) -> torch.Tensor | None:
    """Orthonormal [m, r], leading first, of the positive semidefinite matrix `apply` multiplies blocks [m, b] with.

    The space of X, G X, G^2 X, ... is built up block by block in fp64, X = `start` [m, b], until each of the r largest
    eigenvalues of G within it grows by no more than a hundred-thousandth. None where they do not settle. X should be
    random, in the range of G.
    """
    size, width = start.shape
    # A vector to a row, in memory that is touched as far as steps go.
    basis = start.new_empty(MAXIMUM_STEPS * width, size)
    basis[:width] = torch.linalg.qr(start).Q.T
    projected = start.new_zeros(0, 0)
    captured = start.new_zeros(count)
    for known in range(width, len(basis) + 1, width):
        spanned = basis[:known]
        image = apply(spanned[-width:].T)
        along = spanned @ image
        projected = _bordered(projected, along)
        gains, rotations = torch.linalg.eigh(projected)
        leading = gains[-count:]
        if bool((leading - captured <= TOLERANCE * leading + ROUNDING * leading[-1]).all()):
            vectors: torch.Tensor = spanned.T @ rotations[:, -count:].flip(1)
            return vectors
        captured = leading
        if known < len(basis):
            basis[known : known + width] = _orthonormal_beside(spanned, image.addmm_(spanned.T, along, alpha=-1)).T
    return None


def _bordered(projected: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix [k, k], grown by the last columns `along` [k + b, b] and their mirror image."""
    known, size = len(projected), len(along)
    grown = along.new_empty(size, size)
    grown[:known, :known] = projected
    grown[:, known:], grown[known:, :known] = along, along[:known].T
    return (grown + grown.T) / 2


def _orthonormal_beside(spanned: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span what the block [m, b], already almost free of the rows [k, m], adds to them."""
    block = torch.linalg.qr(block).Q
    beside: torch.Tensor = torch.linalg.qr(block.addmm_(spanned.T, spanned @ block, alpha=-1)).Q
    return beside
