"""What the command line may say."""

from typing import Any

import pytest
import torch

from longshadow.compress.options import CompensationOptions


def test_sizes_become_ranks_or_weights() -> None:
    shapes = [(100, 60), (20, 100)]
    assert CompensationOptions().rank_or_budget(shapes) == (None, 32 * 160 + 20 * 120)
    assert CompensationOptions(rank=5).rank_or_budget(shapes) == (5, None)
    assert CompensationOptions(budget_mb=2).rank_or_budget(shapes) == (None, 10**6)
    assert CompensationOptions(budget_bpw=0.5).rank_or_budget(shapes) == (None, 250)
    assert CompensationOptions(budget_mb=2, dtype=torch.float32).rank_or_budget(shapes) == (None, 500_000)
    assert CompensationOptions(method="best").methods == ("eora", "diagonal", "svd", "fisher")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8, "budget_mb": 1.0}, "give --rank or --budget-mb, not both"),
        ({"budget_bpw": 8, "budget_mb": 1.0}, "give --budget-mb or --budget-bpw, not both"),
        ({"rank": 0}, "--rank must be at least 1"),
        ({"num_samples": 0}, "--num-samples must be at least 1"),
        ({"sequence_length": 1}, "--sequence-length must be at least 2"),
        ({"budget_mb": 0.0}, "--budget-mb must be above 0"),
        ({"budget_bpw": -1.0}, "--budget-bpw must be above 0"),
        ({"budget_mb": float("inf")}, "--budget-mb must be above 0 and finite, got inf"),
        ({"budget_bpw": float("nan")}, "--budget-bpw must be above 0 and finite, got nan"),
        ({"shrinkage": float("nan")}, "--shrinkage must be from 0 to 1, got nan"),
        ({"uniform_rank": True}, "--uniform-rank goes with"),
        ({"shrinkage": 1.5}, "--shrinkage must be from 0 to 1"),
        ({"method": "guess"}, "--method must be one of"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompensationOptions(**options)
