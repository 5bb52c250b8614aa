"""Every check, on an adapter that passes and on one that does not; PEFT's logits beside the factors' own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longshadow.compress.adapters.bases import read_base
from longshadow.compress.adapters.comparison import compare_with_peft
from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.adapters.reading import read_adapter
from longshadow.compress.adapters.verification import Verification, known_base, verify_adapter
from longshadow.compress.solver import Factors
from longshadow.models import LoadedModel
from tests.compress.adapters.lora_files import factors_for, write_lora
from tests.tiny_models import tiny_model, tiny_tokenizer, write_folder


def small_factors(dtype: torch.dtype = torch.float32) -> dict[str, Factors]:
    layers = factors_for(tiny_model(), dtype=dtype)
    return {name: Factors(lora_b=f.lora_b / 16, lora_a=f.lora_a / 16) for name, f in layers.items()}


def loaded_tiny(dtype: torch.dtype = torch.float32) -> LoadedModel:
    return LoadedModel(name="tiny", model=tiny_model().to(dtype), tokenizer=tiny_tokenizer(), max_positions=None)


def results(verification: Verification) -> dict[str, str]:
    return {check.name: check.result for check in verification.checks}


def test_a_good_adapter(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", small_factors(), base_model="m", others={"compensation_report.json": "{}"})
    verification = verify_adapter(read_adapter(tmp_path / "adapter"), None)
    assert verification.passed
    assert results(verification) == dict.fromkeys(["form", "scale", "values", "dtype", "targets"], "ok")
    assert json.loads(json.dumps(verification.to_dict()))["passed"] is True


@pytest.mark.parametrize(
    ("config", "check", "result"),
    [
        ({"lora_alpha": 16}, "scale", "note"),
        ({"use_dora": True}, "form", "note"),
        ({"target_modules": ["q_proj", "k_proj"]}, "targets", "failed"),
        ({"target_modules": r".*\.self_attn\..*"}, "targets", "failed"),
        ({"target_modules": r".*_proj"}, "targets", "ok"),
        ({"target_modules": "all-linear"}, "targets", "ok"),
    ],
)
def test_other_adapters(tmp_path: Path, config: dict[str, Any], check: str, result: str) -> None:
    folder = write_lora(tmp_path / "lora", factors_for(tiny_model(), ranks=(8,)), **config)
    verification = verify_adapter(read_adapter(folder), None)
    assert results(verification)[check] == result
    assert verification.passed is (result != "failed")


def test_a_compensation_of_another_scale_fails(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora", factors_for(tiny_model(), ranks=(8,)), lora_alpha=4)
    (folder / "compensation_report.json").write_text("{}")
    verification = verify_adapter(read_adapter(folder), None)
    assert results(verification)["scale"] == "failed" and not verification.passed


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    layers = small_factors()
    list(layers.values())[5].lora_a[0, 3] = torch.inf
    save_adapter(tmp_path / "adapter", layers, base_model="m")
    verification = verify_adapter(read_adapter(tmp_path / "adapter"), None)
    [failed] = [check for check in verification.checks if check.result == "failed"]
    assert failed.name == "values" and list(layers)[5] in failed.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_computes_the_factors(tmp_path: Path, dtype: torch.dtype) -> None:
    pytest.importorskip("peft", reason="needs the extra train")
    layers = small_factors(torch.bfloat16)
    scaled = {name: Factors(lora_b=f.lora_b.repeat(1, 2), lora_a=f.lora_a.repeat(2, 1)) for name, f in layers.items()}
    ranks = {name: factors.rank for name, factors in scaled.items()}
    folder = write_lora(tmp_path / "lora", scaled, r=10, lora_alpha=5, rank_pattern=ranks, alpha_pattern={".*": 6})
    adapter = read_adapter(folder)
    assert len({layer.scale for layer in adapter.layers.values()}) == 5
    found = compare_with_peft(loaded_tiny(dtype).model, adapter)
    assert found.agrees and found.difference < 0.1 * found.effect and found.effect > 0.05
    assert found.dtype == str(dtype).removeprefix("torch.")


def test_what_peft_leaves_out_is_seen(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra train")
    layers = factors_for(tiny_model(), ranks=(8,))
    folder = write_lora(tmp_path / "lora", layers, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    verification = verify_adapter(read_adapter(folder), None, loaded_tiny())
    assert results(verification)["base"] == "ok"
    assert results(verification)["logits"] == "failed" and not verification.passed


def test_what_peft_cannot_load(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra train")
    folder = write_lora(tmp_path / "lora", factors_for(tiny_model(), ranks=(8,)), target_modules=["nowhere"])
    [failed] = [c for c in verify_adapter(read_adapter(folder), None, loaded_tiny()).checks if c.name == "logits"]
    assert failed.result == "failed" and "PEFT cannot load" in failed.detail


def test_an_effect_too_small_to_compare(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra train")
    layers = {name: Factors(lora_b=f.lora_b * 1e-4, lora_a=f.lora_a) for name, f in small_factors().items()}
    save_adapter(tmp_path / "adapter", layers, base_model="m")
    verification = verify_adapter(read_adapter(tmp_path / "adapter"), None, loaded_tiny(torch.bfloat16))
    assert results(verification)["logits"] == "note" and verification.passed


def test_another_base(tmp_path: Path) -> None:
    layers = small_factors()
    layers["model.layers.7.mlp.up_proj"] = layers.pop("model.layers.1.mlp.up_proj")
    layers["model.layers.1.mlp.down_proj"] = Factors(lora_b=torch.ones(32, 2), lora_a=torch.ones(2, 63))
    save_adapter(tmp_path / "adapter", layers, base_model="m")
    verification = verify_adapter(read_adapter(tmp_path / "adapter"), None, loaded_tiny())
    [failed] = [check for check in verification.checks if check.result == "failed"]
    assert failed.name == "base" and "and 1 more such" in failed.detail
    assert "logits" not in results(verification)


def test_another_base_without_loading_it(tmp_path: Path) -> None:
    """Its configuration tells names and shapes; no runtime serves an adapter that does not fit."""
    base = read_base(str(write_folder(tmp_path / "base")))
    save_adapter(tmp_path / "fits", small_factors(), base_model=base.name)
    fitting = verify_adapter(read_adapter(tmp_path / "fits"), base)
    assert results(fitting)["base"] == "ok" and any(verdict.serves for verdict in fitting.runtimes)
    layers = small_factors()
    layers["model.layers.7.mlp.up_proj"] = layers.pop("model.layers.1.mlp.up_proj")
    save_adapter(tmp_path / "other", layers, base_model=base.name)
    other = verify_adapter(read_adapter(tmp_path / "other"), base)
    assert results(other)["base"] == "failed" and not other.passed
    assert not any(verdict.serves for verdict in other.runtimes)
    assert all("another model" in verdict.line for verdict in other.runtimes if verdict.serves is None)


def test_known_bases(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base")
    for name, method in [(str(base), "dense"), ("never/downloaded", None), ("", None)]:
        save_adapter(tmp_path / f"adapter {method} {name[:1].strip('/')}", small_factors(), base_model=name)
        found = known_base(read_adapter(tmp_path / f"adapter {method} {name[:1].strip('/')}"))
        assert (found and found.method) == method
