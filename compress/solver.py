"""EoRA (arXiv 2410.21271) without an inverse: the best low-rank compensation where the activations live.

argmin over rank(B A) <= r of ||(R - B A) C^(1/2)||_F^2 with R = W - W_quantised and C = E[x x^T] is U U^T R, where U
has the r leading eigenvectors of G = R C R^T. Any root T of C gives the same minimiser ([R T]_r T^-1), but none is
needed: B = U, A = U^T R. The eigenvalues of G are what each rank takes away from the error. A `Criterion` may weigh
outputs, so that R is D^(1/2) R above, and B = D^(-1/2) U.

Legend: n inputs of a layer, m outputs, r rank.
"""

from dataclasses import dataclass

import torch

from longshadow.compress import krylov
from longshadow.compress.criterion import AS_PUBLISHED, Criterion, Objective
from longshadow.compress.statistics import InputMoments, Moments, RefitMoments

# Of the largest root: below it, a direction says nothing exact about an output.
SMALLEST_ROOT = 1e-8


@dataclass(frozen=True, eq=False, kw_only=True)
class Spectrum:
    """Directions of a layer's output, the most useful first; fp64.

    Attributes:
        gains: [k], the error that each direction takes away; k = min(m, n), or m where only G is known.
        directions: [m, k], orthonormal.
        total_error: E ||R x||^2, the error without compensation.
    """

    gains: torch.Tensor
    directions: torch.Tensor
    total_error: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Factors:
    """B A is added to the quantised weight; as a LoRA adapter of scale 1, lora_B [m, r] and lora_A [r, n]."""

    lora_b: torch.Tensor
    lora_a: torch.Tensor

    @property
    def rank(self) -> int:
        """r."""
        return len(self.lora_a)

    @property
    def product(self) -> torch.Tensor:
        """B A in fp64, [m, n]."""
        return self.lora_b.double() @ self.lora_a.double()


def spectrum_of(residual: torch.Tensor, moments: Moments) -> Spectrum:
    """The eigenvalues and eigenvectors of G."""
    gram, columns = _smallest_gram(residual, moments)
    gains, vectors = torch.linalg.eigh(gram)
    vectors = vectors.flip(1)
    return Spectrum(
        gains=gains.flip(0).clamp(min=0),
        directions=vectors if columns is None else columns @ vectors,
        total_error=float(gram.trace()),
    )


def gains_of(residual: torch.Tensor, moments: Moments) -> torch.Tensor:
    """The eigenvalues of G alone, largest first, [k]."""
    gram, _ = _smallest_gram(residual, moments)
    gains: torch.Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return gains


def _smallest_gram(residual: torch.Tensor, moments: Moments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """G, or for a tall residual (m > n), whose columns span no more, Q^T G Q, [n, n], and the orthonormal Q, [m, n]."""
    residual = residual.double()
    num_outputs, num_inputs = residual.shape
    columns = None
    if num_outputs > num_inputs and isinstance(moments, InputMoments):
        columns, small = torch.linalg.qr(residual)
        gram = small @ moments.matrix @ small.T
    else:
        gram = moments.error_gram(residual)
    return (gram + gram.T) / 2, columns


def leading_directions(residual: torch.Tensor, moments: Moments, rank: int) -> torch.Tensor:
    """The first `rank` directions of the spectrum, [m, r] (at most its k); large layers need no whole spectrum."""
    residual = residual.double()
    if krylov.is_worthwhile(min(residual.shape), rank):
        start = moments.random_errors(residual, rank + krylov.OVERSAMPLING)
        directions = krylov.leading_eigenvectors(moments.error_operator(residual), start, rank)
        if directions is not None:
            return directions
    return spectrum_of(residual, moments).directions[:, :rank]


def factors_of(residual: torch.Tensor, directions: torch.Tensor) -> Factors:
    """B = U and A = U^T R in fp64: with U the r leading directions [m, r], the best of all factors of that rank."""
    return Factors(lora_b=directions, lora_a=directions.T @ residual.double())


def cast_factors(factors: Factors, residual: torch.Tensor, moments: Moments, dtype: torch.dtype) -> Factors:
    """The factors in `dtype`, balanced, with B made anew for the A that rounding left, as far as C is known.

    Each pair of a column of B and a row of A is scaled to equal norms, so that neither leaves the range of the dtype.
    Where only errors were counted, `refit_b` makes B anew after a second pass over the inputs.

    Raises ValueError where a factor is not finite in `dtype`.
    """
    b_norms, a_norms = factors.lora_b.norm(dim=0), factors.lora_a.norm(dim=1)
    # A direction that R does not have leaves nothing to scale.
    scale = torch.where((b_norms > 0) & (a_norms > 0), (b_norms / a_norms).sqrt(), 1.0)
    balanced = Factors(lora_b=factors.lora_b / scale, lora_a=(factors.lora_a * scale.unsqueeze(1)).to(dtype))
    if isinstance(moments, InputMoments):
        return refit_b(balanced, RefitMoments.of(residual, balanced.lora_a, moments.matrix))
    return _checked(balanced.lora_b.to(dtype), balanced.lora_a)


def refit_b(factors: Factors, moments: RefitMoments) -> Factors:
    """B + (S - B M) M^+ in the dtype of A, with S = R C A^T and M = A C A^T: the best B for this A.

    Where the inputs say nothing, B stays as it is. Raises ValueError where it is not finite in that dtype.
    """
    lora_b = factors.lora_b.double()
    # A direction of A that hardly any input has would be fitted to the rounding of its moments.
    inverse: torch.Tensor = torch.linalg.pinv(moments.inner, hermitian=True, rtol=1e-10)
    refit = lora_b + (moments.cross - lora_b @ moments.inner) @ inverse
    return _checked(refit.to(factors.lora_a.dtype), factors.lora_a)


def _checked(lora_b: torch.Tensor, lora_a: torch.Tensor) -> Factors:
    if not (lora_b.isfinite().all() and lora_a.isfinite().all()):
        raise ValueError(
            f"the compensation does not fit the range of {str(lora_a.dtype).removeprefix('torch.')}: choose bfloat16 "
            "or float32, or look for weights that are not finite"
        )
    return Factors(lora_b=lora_b, lora_a=lora_a)


def remaining_error(residual: torch.Tensor, factors: Factors, covariance: torch.Tensor) -> float:
    """E ||(R - B A) x||^2 over inputs with the second moment C [n, n]."""
    remainder = residual.double() - factors.product
    return float(((remainder @ covariance) * remainder).sum())


def error_left(total_error: float, factors: Factors, moments: RefitMoments) -> float:
    """E ||(R - B A) x||^2 = E ||R x||^2 - 2 <B, S> + <B M, B>, with S and M as in `refit_b`."""
    lora_b = factors.lora_b.double()
    left = total_error - 2 * (lora_b * moments.cross).sum() + ((lora_b @ moments.inner) * lora_b).sum()
    return max(0.0, float(left))


def solve(
    residual: torch.Tensor,
    moments: Moments,
    rank: int,
    *,
    criterion: Criterion = AS_PUBLISHED,
    output_weights: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Factors:
    """The factors of one layer that are the best by a criterion, cast to `dtype`.

    Args:
        residual: [m, n], W - W_quantised.
        moments: of the layer's inputs or of its errors.
        rank: at least 1; more than min(m, n) gives min(m, n).
        output_weights: [m], for the method "fisher", such as the mean squared gradients of the loss.

    Raises ValueError for a rank below 1, for output weights that do not fit and for factors that `dtype` cannot hold.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, got {rank}")
    objective = criterion.objective(residual, moments, output_weights)
    directions = leading_directions(objective.target, objective.moments, rank)
    return factors_along(objective, directions, residual, dtype)


def factors_along(
    objective: Objective, directions: torch.Tensor, residual: torch.Tensor, dtype: torch.dtype
) -> Factors:
    """Factors in `dtype` for the leading directions [m, r] of an objective for the residual [m, n]."""
    factors = factors_of(objective.target, directions)
    roots = objective.output_roots
    if roots is not None:
        # The eigenvector's own entries vanish with the roots, so this divides by nothing small.
        unweighted = directions / roots.clamp(min=SMALLEST_ROOT * float(roots.max())).unsqueeze(1)
        factors = Factors(lora_b=unweighted, lora_a=factors.lora_a)
    return cast_factors(factors, residual, objective.moments, dtype)
