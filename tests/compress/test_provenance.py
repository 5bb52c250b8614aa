"""Whether a quantised model is of this original: by grids, and by what quantisation leaves alone."""

import copy
import logging
from typing import Any

import pytest
import torch

from longshadow import compensate
from longshadow.compress.provenance import FARTHER, changed_beside_layers, times_the_rounding
from longshadow.compress.rounding import RoundToNearest
from tests.compress.test_folding import fold
from tests.compress.test_pipeline import round_to_nearest
from tests.tiny_models import tiny_model


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    """One, and that of another revision."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator) * (torch.rand(512, generator=generator) + 0.3)
    return weight, weight + 0.3 * weight.std() * torch.randn(64, 512, generator=generator)


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 16), (4, 32), (4, 128), (4, 512), (8, 64), (8, 512)])
def test_rounding_goes_to_the_nearest_point_and_another_revision_farther(bits: int, group: int) -> None:
    weight, other = weights()
    rounding = RoundToNearest(bits=bits, group=group)
    of_this, of_other = (times_the_rounding(weight, weight - rounding(it)) for it in (weight, other))
    assert of_this is not None and of_other is not None
    assert of_this <= 1.001 and of_other > FARTHER


def test_other_roundings() -> None:
    """Not to the nearest point, as GPTQ does it; stored in sixteen bits; and none, as after pruning."""
    weight, _ = weights()
    rounded = RoundToNearest(bits=4, group=64)(weight)
    pushed = RoundToNearest(bits=4, group=64)(weight + 0.4 * (weight - rounded).roll(1, 1))
    as_stored = rounded.bfloat16().float()
    for near in (pushed, as_stored):
        assert 0.9 < (times_the_rounding(weight, weight - near) or 0) < FARTHER
    pruned = torch.where(weight.abs() > weight.abs().median(), weight, 0)
    assert times_the_rounding(weight, weight - pruned) is None
    assert times_the_rounding(weight, torch.zeros_like(weight)) in (None, 0)


def test_parameters_that_are_left_alone() -> None:
    original: Any = tiny_model()
    quantized: Any = round_to_nearest(fold(original), bits=3)  # whose norms were changed by folding
    assert changed_beside_layers(original, quantized) is None
    assert changed_beside_layers(original, copy.deepcopy(quantized).bfloat16()) is None
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        other = copy.deepcopy(quantized)
        parameter = other.get_parameter(name)
        parameter.data += 0.01 * parameter.data.abs().mean() * torch.randn_like(parameter)
        assert (changed_beside_layers(original, other) or "").startswith(f"{name} is ")
    rounded = copy.deepcopy(quantized)
    embedding = rounded.get_parameter("model.embed_tokens.weight")
    embedding.data = RoundToNearest(bits=4, group=16)(embedding.data)
    assert changed_beside_layers(original, rounded) and changed_beside_layers(original, rounded, packed=True) is None


@pytest.mark.parametrize("is_other", [False, True])
def test_a_warning(samples: torch.Tensor, caplog: pytest.LogCaptureFixture, is_other: bool) -> None:
    original = tiny_model()
    revision = copy.deepcopy(original)
    if is_other:
        for parameter in revision.parameters():
            parameter.data += 0.3 * parameter.data.std(unbiased=False) * torch.randn_like(parameter)
    with caplog.at_level(logging.WARNING):
        compensate(original, round_to_nearest(revision, bits=4), samples, rank=4, method="eora")
    assert ["another revision" in record.getMessage() for record in caplog.records] == [True] * is_other
