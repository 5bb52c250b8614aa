"""The sum of two adapters, held to s1 B1 A1 + s2 B2 A2 in fp64 and to PEFT with both."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.adapters.merging import merge_adapters
from longshadow.compress.adapters.reading import Adapter, read_adapter
from longshadow.compress.solver import Factors
from tests.compress.adapters.lora_files import factors_for, with_products, write_lora
from tests.tiny_models import tiny_model


def two_adapters(folder: Path, **config: Any) -> tuple[dict[str, Factors], dict[str, Factors]]:
    """A compensation of all layers but one, and a LoRA of some, with layers in either alone."""
    first = factors_for(tiny_model(), dtype=torch.bfloat16)
    del first["model.layers.1.mlp.up_proj"]
    second = {name: f for name, f in factors_for(tiny_model(), ranks=(8,), seed=1).items() if "layers.1" in name}
    save_adapter(folder / "first", first, base_model="quantised/model")
    write_lora(folder / "second", second, **config)
    return first, second


@pytest.mark.parametrize(
    ("config", "scale"), [({"lora_alpha": 12}, 1.5), ({"lora_alpha": 4, "use_rslora": True}, 4 / 8**0.5)]
)
def test_the_sum(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    first, second = two_adapters(tmp_path, **config)
    merged = merge_adapters(read_adapter(tmp_path / "first"), read_adapter(tmp_path / "second"), tmp_path / "merged")
    assert (merged.layers, merged.shared, merged.dtype) == (14, 6, "float32")
    assert merged.base_model == "quantised/model" and merged.other_base == "some/Model"
    adapter = read_adapter(tmp_path / "merged")
    assert adapter.layers.keys() == first.keys() | second.keys() and adapter.rank == merged.rank
    for name, layer in adapter.layers.items():
        expected = torch.zeros(layer.num_outputs, layer.num_inputs, dtype=torch.float64)
        expected += first[name].product if name in first else 0
        expected += scale * second[name].product if name in second else 0
        assert layer.scale == 1
        assert layer.rank == sum(part[name].rank for part in (first, second) if name in part)
        # B is rounded once, to fp32.
        torch.testing.assert_close(adapter.factors(name).product, expected, rtol=1e-6, atol=1e-6)


def test_powers_of_two_are_exact(tmp_path: Path) -> None:
    layers = factors_for(tiny_model(), ranks=(8,), dtype=torch.bfloat16)
    for name, alpha in (("a", 16), ("b", 2)):
        write_lora(tmp_path / name, layers, lora_alpha=alpha)
    merge_adapters(read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b"), tmp_path / "merged")
    adapter = read_adapter(tmp_path / "merged")
    assert adapter.dtype == torch.bfloat16
    for name, factors in layers.items():
        assert torch.equal(adapter.factors(name).product, 2.25 * factors.product)


@torch.no_grad()
def test_peft_computes_the_sum(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra train")
    first, second = two_adapters(tmp_path, lora_alpha=24)
    merge_adapters(read_adapter(tmp_path / "first"), read_adapter(tmp_path / "second"), tmp_path / "merged")
    ids = torch.arange(20)[None]
    expected = with_products(tiny_model(), (first, dict.fromkeys(first, 1)), (second, dict.fromkeys(second, 3)))
    found = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "merged")(ids).logits
    torch.testing.assert_close(found, expected(ids).logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(
        found, with_products(tiny_model(), (first, dict.fromkeys(first, 1)))(ids).logits, atol=0.1
    )


def test_mistakes(tmp_path: Path) -> None:
    first, _ = two_adapters(tmp_path)
    compensation = read_adapter(tmp_path / "first")

    def other(name: str, layers: dict[str, Factors], **config: Any) -> Adapter:
        return read_adapter(write_lora(tmp_path / name, layers, **config))

    wide = {next(iter(first)): Factors(lora_b=torch.ones(48, 8), lora_a=torch.ones(8, 32))}
    plain = {next(iter(first)): Factors(lora_b=torch.ones(32, 8), lora_a=torch.ones(8, 32))}
    large = {next(iter(first)): Factors(lora_b=torch.full((32, 8), 6e4).half(), lora_a=torch.ones(8, 32).half())}
    cases = [
        (other("wide", wide), r"for different models: .*q_proj is \[32, 32\] in .* and \[48, 32\]"),
        (other("dora", plain, use_dora=True), "DoRA"),
        (other("bias", plain, bias="all"), "biases"),
        (other("head", plain, modules_to_save=["lm_head"]), "whole modules"),
        (other("transposed", plain, fan_in_fan_out=True), "transposed"),
    ]
    for adapter, message in cases:
        with pytest.raises(ValueError, match=message):
            merge_adapters(compensation, adapter, tmp_path / "merged")
    halves = other("large", large, lora_alpha=64)
    with pytest.raises(ValueError, match="does not fit the range of float16"):
        merge_adapters(halves, halves, tmp_path / "merged")
    with pytest.raises(ValueError, match="holds something already"):
        merge_adapters(compensation, other("plain", plain), tmp_path / "first")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))
