"""Weights that were GGUF blocks: of a file, which is unpacked when it is loaded, and of layers that keep them."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from torch import nn

from longshadow.compress.formats import format_of, weight_of
from longshadow.models import load_model
from tests import tiny_models
from tests.compress.formats.conftest import with_layers

KINDS = ["Q8_0", "Q4_0", "Q4_1"]


def packed(layer: nn.Linear, kind: str = "Q4_0") -> Any:
    """What transformers has where it has a kernel for the blocks."""
    from transformers.integrations.gguf.utils import GgufLinear

    number = GGMLQuantizationType[kind]
    made = GgufLinear(layer.in_features, layer.out_features, int(number), layer.bias is not None)
    made.weight.data = torch.from_numpy(quants.quantize(layer.weight.detach().numpy(), number))
    made.bias = layer.bias
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    class Rounding(GGUFWriter):
        def add_tensor(self, name: str, tensor: Any, *args: Any, **kwargs: Any) -> None:
            if not name.startswith("blk.") or tensor.ndim < 2:
                return super().add_tensor(name, tensor, *args, **kwargs)
            number = GGMLQuantizationType[kind]
            return super().add_tensor(name, quants.quantize(tensor, number), raw_dtype=number)

    monkeypatch.setattr("gguf.GGUFWriter", Rounding)
    path = tiny_models.write_gguf(tmp_path / "tiny.gguf")
    layer = load_model(str(path), device="cpu").model.get_submodule("model.layers.1.mlp.down_proj")
    [stored] = [tensor for tensor in GGUFReader(path).tensors if tensor.name == "blk.1.ffn_down.weight"]
    assert stored.tensor_type.name == kind
    assert format_of(layer) == "dense"
    assert torch.equal(weight_of(layer), torch.from_numpy(quants.dequantize(stored.data, stored.tensor_type)))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_layers(agrees: Any, kind: str) -> None:
    """On a CPU such a layer takes nine tokens or more, so it cannot be probed."""
    agrees(packed(nn.Linear(128, 64), kind), f"GGUF {kind}", tolerance=1e-6)


def test_reordered_inputs(agrees: Any) -> None:
    layer = packed(nn.Linear(128, 64))
    layer.input_permutation = torch.from_numpy(np.random.default_rng(0).permutation(128))
    agrees(layer, "GGUF Q4_0", tolerance=1e-6)


def test_a_model_is_compensated(model: Any, is_compensated: Any) -> None:
    is_compensated(model, with_layers(copy.deepcopy(model), packed), "GGUF Q4_0")
