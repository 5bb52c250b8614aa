"""Budgets against an exhaustive search."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.compress.allocation import LayerGains, allocate


def gain(layers: dict[str, LayerGains], ranks: dict[str, int]) -> float:
    return sum(layer.weight * float(layer.gains[: ranks[name]].sum()) for name, layer in layers.items())


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(0, 10), min_size=2, max_size=6), min_size=1, max_size=3), st.integers(2, 12))
def test_equal_costs_are_spent_best(gains: list[list[float]], blocks: int) -> None:
    layers = {
        str(number): LayerGains(gains=torch.tensor(sorted(values, reverse=True)).double(), cost=5, weight=1 + number)
        for number, values in enumerate(gains)
    }
    ranks = allocate(layers, blocks * 5, multiple=1)
    assert sum(ranks.values()) <= blocks
    choices = product(*(range(len(layer.gains) + 1) for layer in layers.values()))
    best = max(gain(layers, dict(zip(layers, choice, strict=True))) for choice in choices if sum(choice) <= blocks)
    assert gain(layers, ranks) == pytest.approx(best)


def test_dear_layers_have_to_be_worth_it() -> None:
    layers = {
        "cheap": LayerGains(gains=torch.tensor([4.0, 3.0, 2.0, 1.0]), cost=10),
        "dear": LayerGains(gains=torch.tensor([8.0, 1.0, 1.0, 1.0]), cost=40),
    }
    assert allocate(layers, 40, multiple=1) == {"cheap": 4, "dear": 0}
    assert allocate(layers, 80, multiple=1) == {"cheap": 4, "dear": 1}
    assert allocate(layers, 100, multiple=2) == {"cheap": 4, "dear": 0}
    with pytest.raises(ValueError, match="the cheapest layer needs 80 for rank 8"):
        allocate({"cheap": LayerGains(gains=torch.ones(8), cost=10)}, 79)
