"""The joint low-rank basis of a layer's pre-RoPE keys, accumulated block by block.

Legend: n tokens, W = KV heads x head_dim (the joint key of one token), r rank.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class LowRankBasis:
    """keys ~ coefficients @ rows + mean, with coefficients [n, r] of unit mean square per column.

    Attributes:
        rows: [r, W], directions (orthogonal after weighting), each scaled by the root mean square of its coefficient.
        projection: [W, r], maps (keys - mean) to coefficients.
        mean: [W], zeros without centring.
        energy_kept: 1 - |w (keys - approximation)|^2 / |w keys|^2 over the accumulated keys.
    """

    rows: torch.Tensor
    projection: torch.Tensor
    mean: torch.Tensor
    energy_kept: float

    def coefficients(self, keys: torch.Tensor) -> torch.Tensor:
        """[n, W] -> [n, r]."""
        return (keys - self.mean) @ self.projection


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

    def solve(self, *, rank: int | None, rank_energy: float | None, center: bool, dtype: torch.dtype) -> LowRankBasis:
        """The rank-r approximation with the least |w (keys - approximation)|^2, from a (centred) Gram matrix.

        Eckart-Young on w keys, through its eigendecomposition. Exactly one of `rank` and `rank_energy` (the smallest
        rank that keeps that share of |w keys|^2).
        """
        mean = self._sum / self.num_tokens if center else torch.zeros_like(self._sum)
        weighted = self._gram * torch.outer(self._weights, self._weights)
        weighted_mean = mean * self._weights
        total = weighted.trace()
        eigenvalues, eigenvectors = torch.linalg.eigh(
            weighted - self.num_tokens * torch.outer(weighted_mean, weighted_mean)
        )
        eigenvalues = eigenvalues.flip(0).clamp(min=0)
        lost = torch.cat([eigenvalues.flip(0).cumsum(0).flip(0), eigenvalues.new_zeros(1)])  # lost[r] at rank r
        if rank is None:
            assert rank_energy is not None
            rank = max(1, int((lost > (1 - rank_energy) * total).sum()))
        rank = min(rank, eigenvalues.numel())
        vectors = eigenvectors.flip(1)[:, :rank]
        scale = (eigenvalues[:rank] / self.num_tokens).sqrt()
        scale = scale.clamp(min=torch.finfo(dtype).tiny + 1e-12 * float(scale[0])) if float(scale[0]) > 0 else scale + 1
        return LowRankBasis(
            rows=(vectors / self._weights.unsqueeze(1) * scale).T.to(dtype).contiguous(),
            projection=(vectors * self._weights.unsqueeze(1) / scale).to(dtype).contiguous(),
            mean=mean.to(dtype),
            energy_kept=float(1 - lost[rank] / total) if float(total) > 0 else 1.0,
        )
