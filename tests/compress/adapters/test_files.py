"""PEFT loads the adapter, and the model then computes what the factors say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longshadow.compress.adapters.files import adapter_config, save_adapter
from longshadow.compress.solver import Factors
from tests.compress.adapters.lora_files import factors_for
from tests.tiny_models import tiny_model


@torch.no_grad()
def test_peft_computes_what_the_factors_say(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra train")
    model, expected = tiny_model(), tiny_model()
    layers = factors_for(model)
    save_adapter(tmp_path / "adapter", layers, base_model="some/Model")
    for name, factors in layers.items():
        expected.get_submodule(name).weight += factors.product.float()
    ids = torch.arange(20)[None]
    before = model(ids).logits
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected(ids).logits, atol=1e-2)


def test_the_configuration_has_a_scale_of_one(tmp_path: Path) -> None:
    layers = factors_for(tiny_model())
    save_adapter(tmp_path / "adapter", layers, base_model="some/Model")
    config: dict[str, Any] = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["rank_pattern"] == config["alpha_pattern"] == {name: layer.rank for name, layer in layers.items()}
    assert config["r"] == config["lora_alpha"] == 5 and config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == "some/Model"


def test_layers_of_one_rank_have_patterns_too() -> None:
    layers = factors_for(tiny_model(), ranks=(3,))
    config = adapter_config(layers, "some/Model")
    assert config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"] == dict.fromkeys(layers, 3)


def test_nothing_is_overwritten_and_nothing_left_behind(tmp_path: Path) -> None:
    layers = factors_for(tiny_model())
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder, layers, base_model="m")
    with pytest.raises(ValueError, match="holds something already"):
        save_adapter(folder, layers, base_model="m")
    with pytest.raises(ValueError, match="no layer"):
        save_adapter(tmp_path / "other", {}, base_model="m")
    unwritable = {"x": Factors(lora_b=torch.ones(2, 1, dtype=torch.float32), lora_a=None)}
    with pytest.raises(AttributeError):
        save_adapter(tmp_path / "broken", unwritable, base_model="m")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
