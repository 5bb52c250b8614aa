"""Squared gradients of outputs, against autograd token by token."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from longshadow import compensate
from longshadow.compress.sensitivity import output_sensitivity
from tests.compress.test_pipeline import divergence, round_to_nearest, with_factors
from tests.tiny_models import tiny_model

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]


def test_gradients_of_outputs(samples: torch.Tensor) -> None:
    model = tiny_model().double()
    actual = output_sensitivity(model, samples[:2], head=True)
    assert len(actual) == 15
    for name in NAMES:
        total = 0.0
        for sample in samples[:2]:
            kept: list[torch.Tensor] = []
            hook = model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, kept=kept: kept.append(output)
            )
            logits = model(sample.unsqueeze(0)).logits[0, :-1]
            hook.remove()
            loss = F.cross_entropy(logits, sample[1:], reduction="sum")
            total = total + torch.autograd.grad(loss, kept[0])[0].square().sum((0, 1))
        # The loss is taken in fp32, as everywhere.
        torch.testing.assert_close(actual[name], total / samples[:2].numel(), rtol=1e-4, atol=1e-12)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert len(output_sensitivity(model, samples[:2])) == 14


def test_the_method_fisher(samples: torch.Tensor) -> None:
    original = tiny_model()
    quantized = round_to_nearest(original)
    result = compensate(original, quantized, samples, rank=8)
    assert len(result.factors) == 14
    better = divergence(original, with_factors(quantized, result.factors), samples)
    assert better < 0.9 * divergence(original, quantized, samples)
    plain = compensate(original, quantized, samples, rank=8, method="eora")
    assert any(not torch.equal(plain.factors[name].lora_a, pair.lora_a) for name, pair in result.factors.items())


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no backward for packed weights\nat some place")


def test_models_without_usable_gradients(samples: torch.Tensor) -> None:
    model = tiny_model()
    layer = model.get_submodule(NAMES[1])
    hook = layer.register_forward_pre_hook(lambda module, given: (WithoutGradient.apply(given[0]),))
    with pytest.raises(ValueError, match=r"\(no backward for packed weights\): use --method eora"):
        output_sensitivity(model, samples[:1])
    hook.remove()
    layer.register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * torch.inf,))
    with pytest.raises(ValueError, match="gradients are not finite"):
        output_sensitivity(model, samples[:1])
