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
    apply: Callable[[torch.Tensor], torch.Tensor], size: int, count: int, *, device: torch.device | str = "cpu"
) -> torch.Tensor | None:
    """Orthonormal [m, r], leading first, of the positive semidefinite matrix `apply` multiplies blocks [m, b] with.

    The space of X, G X, G^2 X, ... is built up block by block in fp64, X random with a fixed seed, until each of the r
    largest eigenvalues of G within it grows by no more than a hundred-thousandth. None where they do not settle.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, count + OVERSAMPLING, generator=generator, dtype=torch.float64).to(device)
    newest = basis = torch.linalg.qr(start).Q
    projected = basis.new_zeros(0, 0)
    captured = basis.new_zeros(count)
    for _ in range(MAXIMUM_STEPS):
        image = apply(newest)
        along = basis.T @ image
        projected = _bordered(projected, along)
        gains, rotations = torch.linalg.eigh(projected)
        leading = gains[-count:]
        if bool((leading - captured <= TOLERANCE * leading + ROUNDING * leading[-1]).all()):
            vectors: torch.Tensor = basis @ rotations[:, -count:].flip(1)
            return vectors
        captured = leading
        newest = _orthonormal_beside(basis, image - basis @ along)
        basis = torch.cat([basis, newest], 1)
    return None


def _bordered(projected: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix [k, k], grown by the last columns `along` [k + b, b] and their mirror image."""
    known, size = len(projected), len(along)
    grown = along.new_empty(size, size)
    grown[:known, :known] = projected
    grown[:, known:], grown[known:, :known] = along, along[:known].T
    return (grown + grown.T) / 2


def _orthonormal_beside(basis: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span what the block, already almost free of the basis, adds to it."""
    block = torch.linalg.qr(block).Q
    beside: torch.Tensor = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return beside
