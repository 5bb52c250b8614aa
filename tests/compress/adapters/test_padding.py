"""One rank for all layers, and the same products."""

import json
from pathlib import Path

import pytest
import torch

from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.adapters.padding import export_padded
from longshadow.compress.adapters.reading import read_adapter
from longshadow.compress.solver import Factors
from tests.compress.adapters.lora_files import factors_for, write_lora
from tests.tiny_models import tiny_model


def test_products_stay(tmp_path: Path) -> None:
    layers = factors_for(tiny_model(), ranks=(3, 9, 8), dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", layers, base_model="some/Model")
    told = export_padded(read_adapter(tmp_path / "adapter"), tmp_path / "padded")
    padded = read_adapter(tmp_path / "padded")
    assert {layer.rank for layer in padded.layers.values()} == {16} and padded.base_model == "some/Model"
    assert {layer.scale for layer in padded.layers.values()} == {1} and padded.dtype == torch.bfloat16
    assert told.layers == 14 and told.num_bytes == padded.num_bytes and "rank 16" in told.detail
    config = json.loads((tmp_path / "padded" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 16
    assert config["rank_pattern"] == config["alpha_pattern"] == dict.fromkeys(layers, 16)
    for name, factors in layers.items():
        assert torch.equal(padded.factors(name).product, factors.product)


def test_scales_are_folded(tmp_path: Path) -> None:
    layers = factors_for(tiny_model(), ranks=(8,))
    write_lora(tmp_path / "lora", layers, lora_alpha=4)
    export_padded(read_adapter(tmp_path / "lora"), tmp_path / "padded", torch.float16)
    padded = read_adapter(tmp_path / "padded")
    assert padded.dtype == torch.float16 and padded.rank == 8
    for name, factors in layers.items():
        torch.testing.assert_close(padded.factors(name).product, factors.product / 2, rtol=1e-2, atol=1e-2)


def test_a_rank_beyond_all_sizes(tmp_path: Path) -> None:
    layers = {"layer": Factors(lora_b=torch.ones(4, 513), lora_a=torch.ones(513, 4))}
    write_lora(tmp_path / "lora", layers, r=513)
    with pytest.raises(ValueError, match="rank 513, above the largest size"):
        export_padded(read_adapter(tmp_path / "lora"), tmp_path / "padded")
    assert not (tmp_path / "padded").exists()
