"""The joint low-rank basis of a layer's pre-RoPE keys, accumulated block by block.

Legend: n tokens, W = KV heads x head_dim (the joint key of one token), r rank.
"""

from dataclasses import dataclass

import torch

from longshadow.engine.shadowkv.subspace import TINY, dominant_subspace

HALF_PRECISION = (torch.float16, torch.bfloat16)
# Least root mean square of a coefficient before scaling, as a share of the largest.
SMALLEST_SCALE = 1e-6


@dataclass(frozen=True, eq=False)
class LowRankBasis:
    """keys ~ coefficients @ rows + mean, with uncorrelated coefficients [n, r] of unit mean square per column.

    Attributes:
        rows: [r, W]; weighted, they span the subspace that keeps the most energy.
        projection: [W, r], maps (keys - mean) to coefficients.
        mean: [W], zeros without centring.
        energy_kept: 1 - |w (keys - approximation)|^2 / |w keys|^2 over the accumulated keys.
    """

    rows: torch.Tensor
    projection: torch.Tensor
    mean: torch.Tensor
    energy_kept: float

    def coefficients(self, keys: torch.Tensor) -> torch.Tensor:
        """[n, W] -> [n, r], in the dtype of the basis; on a GPU half-precision keys are multiplied as they are."""
        if keys.is_cuda and keys.dtype in HALF_PRECISION:
            return self._coefficients_of_half(keys)
        return (keys.to(self.projection.dtype) - self.mean) @ self.projection

    def _coefficients_of_half(self, keys: torch.Tensor) -> torch.Tensor:
        """Products in the keys' dtype, sums in fp32; the projection, its entries at most 1, is rounded, too."""
        scale = self.projection.abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny)
        projection = (self.projection / scale).to(keys.dtype)
        products = torch.mm(keys, projection, out_dtype=torch.float32)
        return products.sub_(self.mean @ projection.float()).mul_(scale)


class GramAccumulator:
    """Sums of keys and of their outer products, from which the basis follows without an SVD of the keys.

    Memory W^2, whatever the number of tokens; blocks may come from successive prefill chunks.
    """

    def __init__(self, width: int, device: torch.device, weights: torch.Tensor | None = None) -> None:
        """`weights`: w [W] > 0, the importance of each element; None: all alike."""
        self.num_tokens = 0
        self._weights = torch.ones(width, dtype=torch.float64, device=device) if weights is None else weights.double()
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, keys: torch.Tensor) -> None:
        """Accumulates keys [n, W], fp32 or better: products in their dtype, sums in fp64."""
        self.num_tokens += keys.shape[0]
        self._sum += keys.sum(0)
        self._gram += keys.T @ keys

    def add_sums(self, gram: torch.Tensor, key_sum: torch.Tensor, num_tokens: int) -> None:
        """Accumulates what `summarize_keys` made of `num_tokens` keys: keys^T keys [W, W] and their sum [W]."""
        self.num_tokens += num_tokens
        self._sum += key_sum
        self._gram += gram

    def solve(
        self,
        *,
        rank: int | None,
        rank_energy: float | None,
        center: bool,
        dtype: torch.dtype,
        iterative: bool | None = None,
    ) -> LowRankBasis:
        """The rank-r approximation with the least |w (keys - approximation)|^2, from a (centred) Gram matrix.

        Eckart-Young on w keys, through its eigendecomposition. Exactly one of `rank` and `rank_energy` (the smallest
        rank that keeps that share of |w keys|^2). `iterative`: for a given rank a subspace iteration instead, which
        keeps the same energy within 0.1 % in products a GPU is good at; None: on a GPU, where something is left out.
        """
        if iterative is None:
            iterative = rank is not None and rank < len(self._gram) and self._gram.device.type == "cuda"
        mean = self._sum / self.num_tokens if center else torch.zeros_like(self._sum)
        weighted = self._gram * torch.outer(self._weights, self._weights)
        weighted_mean = mean * self._weights
        total = weighted.trace()
        centred = weighted - self.num_tokens * torch.outer(weighted_mean, weighted_mean)
        if iterative:
            assert rank is not None
            return self._iterate(centred, total, mean, min(rank, centred.shape[0]), dtype)
        eigenvalues, eigenvectors = torch.linalg.eigh(centred)
        eigenvalues = eigenvalues.flip(0).clamp(min=0)
        lost = torch.cat([eigenvalues.flip(0).cumsum(0).flip(0), eigenvalues.new_zeros(1)])  # lost[r] at rank r
        if rank is None:
            assert rank_energy is not None
            rank = max(1, int((lost > (1 - rank_energy) * total).sum()))
        rank = min(rank, eigenvalues.numel())
        vectors = eigenvectors.flip(1)[:, :rank]
        scale = (eigenvalues[:rank] / self.num_tokens).sqrt()
        # Directions without energy, of fewer tokens than the rank: their coefficients, rounding, must stay small.
        smallest = torch.finfo(dtype).tiny + SMALLEST_SCALE * float(scale[0])
        scale = scale.clamp(min=smallest) if float(scale[0]) > 0 else scale + 1
        return LowRankBasis(
            rows=(vectors / self._weights.unsqueeze(1) * scale).T.to(dtype).contiguous(),
            projection=(vectors * self._weights.unsqueeze(1) / scale).to(dtype).contiguous(),
            mean=mean.to(dtype),
            energy_kept=float(1 - lost[rank] / total) if float(total) > 0 else 1.0,
        )

    def _iterate(
        self, centred: torch.Tensor, total: torch.Tensor, mean: torch.Tensor, rank: int, dtype: torch.dtype
    ) -> LowRankBasis:
        """The basis from a subspace iteration on the (centred) weighted Gram matrix; the host waits once.

        With Q its orthonormal basis and Q^T G Q / n = L L^T, coefficients w (x - mean) Q L^-T have the identity as
        their second moments, and the eigenvectors within the subspace need not be known.
        """
        # Rounding of a mean much larger than the rest can leave it a negative energy, which attracts the iteration.
        direction = mean * self._weights
        direction = direction / direction.norm().clamp(min=TINY)
        centred = centred - (direction @ centred @ direction).clamp(max=0) * torch.outer(direction, direction)
        subspace = dominant_subspace(centred, rank)
        moments = subspace.T @ (centred @ subspace) / self.num_tokens
        kept = moments.trace() * self.num_tokens
        moments.diagonal().add_(SMALLEST_SCALE**2 * moments.diagonal().amax().clamp(min=TINY))
        factor = torch.linalg.cholesky_ex(moments).L
        whitened = torch.linalg.solve_triangular(factor.T, subspace, upper=True, left=False)
        weights = self._weights.unsqueeze(1)
        lost = (centred.trace() - kept).clamp(min=0)
        return LowRankBasis(
            rows=(subspace @ factor / weights).T.to(dtype).contiguous(),
            projection=(whitened * weights).to(dtype).contiguous(),
            mean=mean.to(dtype),
            energy_kept=float(torch.where(total > 0, 1 - lost / total, 1.0)),
        )
