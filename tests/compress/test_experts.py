"""What is told of experts, which are no linear layers."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from longshadow import compensate
from longshadow.compress.experts import left_out
from tests.compress.test_pipeline import round_to_nearest
from tests.tiny_models import tiny_model

NUM_EXPERTS, HIDDEN, INNER, NUM_BLOCKS = 4, 32, 48, 2
IN_EXPERTS = NUM_BLOCKS * NUM_EXPERTS * 3 * INNER * HIDDEN


def mixture() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=NUM_EXPERTS,
        pad_token_id=None,
    )
    return MixtralForCausalLM(config).eval()


def rounded_experts(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = (parameter.data * 64).round() / 64
    return model


def test_experts_that_changed_are_told(caplog: pytest.LogCaptureFixture) -> None:
    original = mixture()
    quantized = rounded_experts(round_to_nearest(original)).bfloat16()
    found = left_out(original, quantized)
    assert found is not None and found.num_weights == IN_EXPERTS and found.num_bytes == 2 * IN_EXPERTS
    total = sum(parameter.numel() for parameter in original.model.layers.parameters())
    assert found.share == IN_EXPERTS / total > 0.5
    ids = torch.arange(64).view(2, 32)
    with caplog.at_level(logging.WARNING):
        result = compensate(original, quantized.float(), ids, rank=4)
    assert result.left_out is not None and result.left_out.share == found.share
    assert all("self_attn" in name for name in result.factors) and len(result.factors) == 4 * NUM_BLOCKS
    [message] = [record.getMessage() for record in caplog.records if "experts" in record.getMessage()]
    assert f"{IN_EXPERTS:,} weights are {found.share:.1%}" in message and "model.layers.0.mlp.experts." in message


def test_experts_that_stay_as_they_are_cost_nothing() -> None:
    original = mixture()
    assert left_out(original, round_to_nearest(original)) is None
    # As loaded from one file, in fp32 and as stored.
    stored = copy.deepcopy(original).bfloat16()
    assert left_out(copy.deepcopy(stored).float(), stored) is None
    stored.model.layers[1].mlp.experts.down_proj.data[3, 2, 1] += 1
    found = left_out(copy.deepcopy(original).bfloat16().float(), stored)
    assert found is not None and found.num_weights == NUM_EXPERTS * INNER * HIDDEN


def test_packed_experts_are_counted_as_stored() -> None:
    original = mixture()
    packed = copy.deepcopy(original)
    for block in packed.model.layers:
        experts = block.mlp.experts
        codes = torch.zeros(NUM_EXPERTS, 2 * INNER, HIDDEN // 2, dtype=torch.uint8)
        experts.gate_up_proj = nn.Parameter(codes, requires_grad=False)
        experts.gate_up_proj_scales = nn.Parameter(torch.ones(NUM_EXPERTS, 2 * INNER))
    found = left_out(original, packed)
    assert found is not None and found.num_weights == 2 * IN_EXPERTS // 3
    assert found.num_bytes == NUM_BLOCKS * NUM_EXPERTS * (2 * INNER * HIDDEN // 2 + 4 * 2 * INNER)


def test_a_model_without_experts() -> None:
    assert left_out(tiny_model(), round_to_nearest(tiny_model())) is None
