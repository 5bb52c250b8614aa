"""Compensation of whole models: exact at full rank, better at any, and within its budget."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longshadow import compensate
from longshadow.compress import save_adapter
from longshadow.compress.adapters.reading import read_adapter
from longshadow.compress.blocks import decoder_blocks, linear_layers
from tests.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]


def round_to_nearest(model: nn.Module, *, bits: int = 2, group: int = 16) -> nn.Module:
    """A copy whose blocks' weights are rounded to a grid per group of inputs."""
    rounded = copy.deepcopy(model)
    for block in decoder_blocks(rounded):
        for layer in linear_layers(block).values():
            weight: Any = layer.weight
            groups = weight.data.view(len(weight), -1, group)
            lowest = groups.amin(2, keepdim=True)
            step = (groups.amax(2, keepdim=True) - lowest) / (2**bits - 1)
            weight.data = ((groups - lowest) / step).round().mul(step).add(lowest).view_as(weight)
    return rounded


def with_rounded_head(model: nn.Module) -> nn.Module:
    """The model itself, its head rounded to quarters and apart from the embedding."""
    known: Any = model
    known.lm_head.weight = nn.Parameter((known.lm_head.weight.detach() * 4).round() / 4)
    known.config.tie_word_embeddings = False
    return model


def divergence(original: nn.Module, other: nn.Module, samples: torch.Tensor) -> float:
    """Mean KL of the next token's distribution from the original's."""
    with torch.no_grad():
        expected, actual = (model(samples).logits.double().log_softmax(-1) for model in (original, other))
    return float((expected.exp() * (expected - actual)).sum(-1).mean())


def with_factors(model: nn.Module, factors: dict[str, Any]) -> nn.Module:
    merged = copy.deepcopy(model)
    for name, pair in factors.items():
        merged.get_submodule(name).weight.data += pair.product.float()
    return merged


@pytest.mark.parametrize("propagate", ["sequential", "quantized", "original"])
def test_full_rank_is_the_original(samples: torch.Tensor, propagate: Any) -> None:
    original = tiny_model()
    quantized = round_to_nearest(original)
    result = compensate(original, quantized, samples, rank=64, propagate=propagate, dtype=torch.float32)
    merged = with_factors(quantized, result.factors)
    torch.testing.assert_close(merged(samples).logits, original(samples).logits, rtol=0, atol=1e-4)
    assert len(result.factors) == 2 * 7
    assert all(layer.after < 1e-6 < layer.before for layer in result.layers.values())


def test_the_example_of_the_readme(samples: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs as it stands, and leaves an adapter with the factors that it found."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Compensate a quantised model")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {"original": tiny_model(), "quantized": round_to_nearest(tiny_model()), "samples": samples}
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    saved, result = read_adapter(tmp_path / "adapter"), names["result"]
    assert saved.base_model == "QUANTIZED" and set(saved.layers) == result.factors.keys()
    assert len(result.factors) == 14 and saved.rank == 32


def test_more_ranks_leave_less(samples: torch.Tensor) -> None:
    original = tiny_model()
    quantized = round_to_nearest(original)
    errors = [divergence(original, quantized, samples)]
    for rank in (2, 8, 24):
        result = compensate(original, quantized, samples, rank=rank)
        assert all(pair.rank == min(rank, *pair.product.shape) for pair in result.factors.values())
        assert all(pair.lora_a.dtype == torch.bfloat16 for pair in result.factors.values())
        errors.append(divergence(original, with_factors(quantized, result.factors), samples))
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.7 * errors[0]


def test_a_layers_error_is_what_it_says(samples: torch.Tensor) -> None:
    """Of the first block's first layer, whose inputs are the same in both models."""
    original = tiny_model()
    quantized = round_to_nearest(original)
    result = compensate(original, quantized, samples, rank=4, dtype=torch.float32)
    name = "model.layers.0.self_attn.q_proj"
    inputs: list[torch.Tensor] = []
    layer = original.get_submodule(name)
    layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    original(samples)
    tokens = inputs[0].double().flatten(0, 1)
    residual = (layer.weight - quantized.get_submodule(name).weight).double()
    energy = (tokens @ layer.weight.double().T).square().sum()
    before = (tokens @ residual.T).square().sum() / energy
    after = (tokens @ (residual - result.factors[name].product).T).square().sum() / energy
    assert result.layers[name].before == pytest.approx(float(before), rel=1e-4)
    assert result.layers[name].after == pytest.approx(float(after), rel=1e-3)


def test_budgets_are_kept_and_spent(samples: torch.Tensor) -> None:
    original = tiny_model()
    quantized = round_to_nearest(original)
    published: Any = {"method": "eora", "shrinkage": 0.0}
    uniform = compensate(original, quantized, samples, rank=8, **published)
    spread = compensate(original, quantized, samples, rank=None, budget=uniform.num_weights, **published)
    by_loss = compensate(original, quantized, samples, rank=None, budget=uniform.num_weights)
    for result in (spread, by_loss):
        assert 0.8 * uniform.num_weights < result.num_weights <= uniform.num_weights
        assert {layer.rank % 8 for layer in result.layers.values()} == {0}

    def total(layers: Any) -> float:
        return sum(layer.after for layer in layers.values())

    assert total(spread.layers) <= 1.02 * total(uniform.layers)
    with pytest.raises(ValueError, match="too small"):
        compensate(original, quantized, samples, rank=None, budget=10)


def test_uniform_ranks_of_a_budget(samples: torch.Tensor) -> None:
    original = tiny_model()
    quantized = round_to_nearest(original)
    cost = compensate(original, quantized, samples, rank=8).num_weights
    for budget, rank in ((cost, 8), (2 * cost - 1, 8), (2 * cost, 16)):
        result = compensate(original, quantized, samples, rank=None, budget=budget, uniform=True)
        assert {layer.rank for layer in result.layers.values()} == {rank}
    with pytest.raises(ValueError, match="rank 8 for every layer needs"):
        compensate(original, quantized, samples, rank=None, budget=cost - 1, uniform=True)


def test_the_head(samples: torch.Tensor) -> None:
    original = tiny_model()
    quantized = with_rounded_head(round_to_nearest(original))
    without = compensate(original, quantized, samples, rank=64, dtype=torch.float32)
    result = compensate(original, quantized, samples, rank=64, dtype=torch.float32, head=True)
    assert result.factors.keys() - without.factors.keys() == {"lm_head"}
    merged = with_factors(quantized, result.factors)
    torch.testing.assert_close(merged(samples).logits, original(samples).logits, rtol=0, atol=1e-4)


def test_eora_leaves_less_than_other_methods(samples: torch.Tensor) -> None:
    original = tiny_model()
    quantized = round_to_nearest(original)
    left = {
        method: sum(
            layer.after
            for layer in compensate(
                original, quantized, samples, rank=8, method=method, propagate="quantized"
            ).layers.values()
        )
        for method in ("eora", "diagonal", "svd")
    }
    assert left["eora"] < left["diagonal"] and left["eora"] < left["svd"]
    with pytest.raises(ValueError, match="method must be"):
        compensate(original, quantized, samples, method="guess")


def test_what_did_not_change_gets_nothing(samples: torch.Tensor) -> None:
    original = tiny_model()
    quantized = copy.deepcopy(original)
    layer = quantized.get_submodule("model.layers.1.mlp.down_proj")
    layer.weight.data += 0.002 * torch.randn_like(layer.weight)
    assert list(compensate(original, quantized, samples, rank=4).factors) == ["model.layers.1.mlp.down_proj"]


def test_models_that_do_not_match_are_refused(samples: torch.Tensor) -> None:
    original = tiny_model()
    quantized = round_to_nearest(original)
    del quantized.model.layers[1]
    with pytest.raises(ValueError, match="2 and 1 blocks"):
        compensate(original, quantized, samples)
    quantized = round_to_nearest(original)
    quantized.get_submodule("model.layers.0.mlp.up_proj").weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="up_proj has weights that are not finite"):
        compensate(original, quantized, samples)
    quantized.get_submodule("model.layers.0.mlp").up_proj = nn.Linear(32, 8, bias=False)
    with pytest.raises(ValueError, match=r"is \[64, 32\] in one"):
        compensate(original, quantized, samples)
    with pytest.raises(ValueError, match="either a rank or a budget"):
        compensate(original, quantized, samples, rank=8, budget=100)
    with pytest.raises(ValueError, match="keeps no decoder blocks"):
        compensate(nn.Linear(2, 2), nn.Linear(2, 2), samples)


def test_the_adapter_does_it_in_peft(samples: torch.Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra train")
    original = tiny_model()
    quantized = round_to_nearest(original)
    result = compensate(original, quantized, samples, rank=8, dtype=torch.float32)
    expected = with_factors(quantized, result.factors)(samples).logits
    save_adapter(tmp_path / "adapter", result.factors, base_model="some/Model")
    loaded = peft.PeftModel.from_pretrained(quantized, tmp_path / "adapter")
    torch.testing.assert_close(loaded(samples).logits, expected, rtol=0, atol=1e-4)
