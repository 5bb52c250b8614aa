"""A model folder that computes what the base and its adapter do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from longshadow.compress.adapters import merged_export
from longshadow.compress.adapters.bases import Base, read_base
from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.adapters.merged_export import export_merged, merge_into
from longshadow.compress.adapters.reading import read_adapter
from longshadow.compress.solver import Factors
from tests.compress.adapters.lora_files import factors_for, with_products, write_lora
from tests.tiny_models import tiny_model, tiny_tokenizer


def write_base(folder: Path, dtype: torch.dtype) -> Base:
    tiny_model().to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return read_base(str(folder))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_computes_the_sum(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_export, "SHARD", "20KB")
    layers = factors_for(tiny_model(), ranks=(8,))
    write_lora(tmp_path / "lora", layers, lora_alpha=12)
    told = export_merged(read_adapter(tmp_path / "lora"), write_base(tmp_path / "base", dtype), tmp_path / "merged")
    assert told.dtype == str(dtype).removeprefix("torch.") and told.layers == 14
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    expected = with_products(tiny_model().to(dtype), (layers, dict.fromkeys(layers, 1.5)))
    assert merged.dtype == dtype
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == load_file(tmp_path / "base" / "model.safetensors").keys()
    written = {path.name for path in (tmp_path / "merged").iterdir() if not path.name.startswith("model")}
    assert written == {path.name for path in (tmp_path / "base").iterdir() if not path.name.startswith("model")}
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name])
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("the").input_ids == tiny_tokenizer()("the").input_ids
    assert ("0.0% of the adapter lost" in told.detail) == (dtype == torch.float32)


def test_bases_that_are_not_dense(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", factors_for(tiny_model()), base_model="m")
    adapter = read_adapter(tmp_path / "adapter")
    for method in ("bitsandbytes", "gptq", "gguf"):
        with pytest.raises(ValueError, match=rf"stored quantised \({method}\)"):
            export_merged(adapter, Base(name="m", method=method, config=tiny_model().config), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_layers_that_cannot_take_it(tmp_path: Path) -> None:
    square = Factors(lora_b=torch.ones(258, 8), lora_a=torch.ones(8, 32))
    head = read_adapter(write_lora(tmp_path / "head", {"lm_head": square}))
    model = tiny_model()
    assert [model.lm_head.out_features, model.lm_head.in_features] == [258, 32]
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        merge_into(model, head)

    class Packed(nn.Linear):
        """As the layers of a quantised model are."""

    model = tiny_model()
    packed = Packed(32, 32, bias=False)
    model.model.layers[0].self_attn.q_proj = packed
    adapter = read_adapter(write_lora(tmp_path / "lora", factors_for(tiny_model(), ranks=(8,))))
    with pytest.raises(ValueError, match=r"q_proj is no dense linear layer but a Packed"):
        merge_into(model, adapter)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    layers = factors_for(tiny_model())
    layers["model.layers.9.mlp.up_proj"] = layers.pop("model.layers.1.mlp.up_proj")
    save_adapter(tmp_path / "adapter", layers, base_model="m")
    base = write_base(tmp_path / "base", torch.float32)
    with pytest.raises(ValueError, match=r"another model: it has no layer model.layers.9"):
        export_merged(read_adapter(tmp_path / "adapter"), base, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "file").touch()
    with pytest.raises(ValueError, match="holds something already"):
        export_merged(read_adapter(tmp_path / "adapter"), base, tmp_path / "merged")
