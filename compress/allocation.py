"""How a budget of adapter weights is spread over layers: to wherever a rank takes away the most error per weight."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerGains:
    """What a layer offers.

    Attributes:
        gains: [k], the error that each rank takes away, not rising.
        cost: weights that a rank takes, m + n.
        weight: how much this layer's error matters.
    """

    gains: torch.Tensor
    cost: int
    weight: float = 1.0


def allocate(layers: Mapping[str, LayerGains], budget: int, *, multiple: int = 8) -> dict[str, int]:
    """Ranks, in whole multiples, whose weights number at most `budget`; layers may get none.

    Water-filling: blocks of `multiple` ranks are taken in the order of weight x gains / cost. A layer's gains do not
    rise, so no spread with the same weights takes away more error, up to the last block of each layer.

    Raises ValueError where not even one block fits.
    """
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    blocks = []
    for name, layer in layers.items():
        usable = len(layer.gains) // multiple * multiple
        for number, gain in enumerate(layer.gains[:usable].view(-1, multiple).sum(1).tolist()):
            blocks.append((-layer.weight * gain / layer.cost, name, number))
    ranks = dict.fromkeys(layers, 0)
    left = budget
    for _, name, number in sorted(blocks):
        price = multiple * layers[name].cost
        # A layer that once did not fit gets no later block: those come after the one it lacks.
        if price <= left and ranks[name] == number * multiple:
            ranks[name] += multiple
            left -= price
    if layers and not any(ranks.values()):
        least = min((multiple * layer.cost for layer in layers.values()), default=0)
        raise ValueError(
            f"a budget of {budget} weights is too small: the cheapest layer needs {least} for rank {multiple}"
        )
    return ranks
