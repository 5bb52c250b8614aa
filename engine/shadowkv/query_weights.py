"""How much each element of a key matters to the queries that meet it.

Legend: Hq query heads, H KV heads, G = Hq / H, T tokens, D head_dim.
"""

import torch

from longshadow.engine.shadowkv.rope import RotaryLayout

# Of the mean weight: elements no query looks at still get a place in the basis.
SMALLEST_WEIGHT = 1e-3


class QueryEnergy:
    """Mean square of the prompt's queries per KV head and key element, from which the basis is weighted.

    A key error e changes a logit by q . e. Between query and key lies a rotation by their distance, which over
    many distances spreads a query pair's energy evenly over the pair, so the expected squared logit error is
    sum_i w_i^2 e_i^2 with w_i^2 the mean of q_i^2 over queries, query heads of the group, and the rotary pair.
    """

    def __init__(self, energy_HD: torch.Tensor | None = None) -> None:
        """`energy_HD`: sums of squares over queries and groups so far; None before the first."""
        self._energy_HD = energy_HD

    def add(self, query: torch.Tensor, num_kv_heads: int) -> None:
        """Counts the queries [Hq, T, D] of a prompt."""
        squares = query.unflatten(0, (num_kv_heads, -1)).float().square().sum((1, 2))
        self._energy_HD = squares if self._energy_HD is None else self._energy_HD + squares

    def key_weights(self, layout: RotaryLayout | None) -> torch.Tensor | None:
        """w [H, D], mean 1 over all elements, which are alike where the queries are all 0; None before the first.

        On a GPU the host does not wait.
        """
        if self._energy_HD is None:
            return None
        energy = self._energy_HD.clone()
        if layout is not None:
            first, second = layout.pairs(self._energy_HD)
            for elements in layout.pairs(energy):
                elements.copy_((first + second) / 2)
        weights = energy.sqrt()
        mean = weights.mean()
        return torch.where(mean > 0, weights / mean, 1.0).clamp_(min=SMALLEST_WEIGHT)

    def copy(self) -> "QueryEnergy":
        """An independent copy; sums are never changed in place."""
        return QueryEnergy(self._energy_HD)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held in memory."""
        return [] if self._energy_HD is None else [self._energy_HD]
