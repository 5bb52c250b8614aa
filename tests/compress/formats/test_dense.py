"""Layers with an ordinary weight, and those that only look like it."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

from longshadow.compress.blocks import linear_layers
from longshadow.compress.formats import format_of, weight_of


def prune_two_of_four(model: nn.Module) -> None:
    pruner = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    pruner.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in names])
    pruner.step()
    pruner.squash_mask()
    assert all(int((layer.weight == 0).sum()) == layer.weight.numel() // 2 for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_read(agrees: Any, dtype: torch.dtype) -> None:
    layer = nn.Linear(128, 64, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    assert torch.equal(agrees(layer, "dense", tolerance=tolerance, dtype=dtype), layer.weight.float())


def test_a_mask_that_is_still_there(agrees: Any) -> None:
    layer = nn.Linear(128, 64)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert int((agrees(layer, "dense", tolerance=1e-6, probe=1e-6) == 0).sum()) == 64 * 64


def test_eight_bits_without_their_scales_are_not_a_weight() -> None:
    layer = nn.Linear(128, 64)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    assert format_of(layer) == "probed Linear"
    with pytest.raises(ValueError, match="Linear does not run on cpu"):
        weight_of(layer)


def test_a_pruned_model_is_compensated(model: Any, is_compensated: Any) -> None:
    pruned = copy.deepcopy(model)
    prune_two_of_four(pruned.model.layers)
    assert len(linear_layers(pruned.model.layers[0])) == 7
    is_compensated(model, pruned, "dense")
