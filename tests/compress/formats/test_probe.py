"""Weights found by probing."""

import pytest
import torch
from torch import nn

from longshadow.compress.formats import format_of, probed_weight, weight_of


class PackedLinear(nn.Module):
    """Keeps int8 rows and a scale for each, as weight-only formats do."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.in_features = weight.shape[1]
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ (self.packed * self.scale).T + self.bias


class RoundsActivations(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward((inputs * 2).round() / 2)


def test_a_packed_layer() -> None:
    layer = PackedLinear(torch.randn(7, 600), torch.randn(7))
    torch.testing.assert_close(weight_of(layer), layer.packed * layer.scale, rtol=0, atol=1e-6)


def test_an_ordinary_layer_is_read() -> None:
    layer = nn.Linear(5, 3, dtype=torch.bfloat16)
    assert torch.equal(weight_of(layer), layer.weight.float())
    torch.testing.assert_close(probed_weight(nn.Linear(5, 3)).shape, torch.Size([3, 5]))


def test_what_is_not_linear_is_refused() -> None:
    with pytest.raises(ValueError, match="RoundsActivations is not linear"):
        probed_weight(RoundsActivations(64, 8))
    with pytest.raises(ValueError, match="no in_features"):
        probed_weight(nn.ReLU())


class TakesHalf(nn.Module):
    """Says nothing about the only dtype that it takes."""

    in_features = 300

    def __init__(self) -> None:
        super().__init__()
        self.rows = [torch.randn(5, 300, dtype=torch.float16)]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.rows[0].T


def test_the_dtype_is_found_by_trying() -> None:
    layer = TakesHalf()
    assert torch.equal(weight_of(layer), layer.rows[0].float())


def test_what_does_not_run_is_refused() -> None:
    layer = TakesHalf()
    layer.rows = []
    with pytest.raises(ValueError, match=r"TakesHalf does not run on cpu, so its weight is unknown \(list index"):
        probed_weight(layer)


def test_names() -> None:
    assert format_of(nn.Linear(2, 2)) == "dense"
    assert format_of(PackedLinear(torch.randn(2, 2), torch.randn(2))) == "probed PackedLinear"
