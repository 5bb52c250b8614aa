"""The zoo knows every causal-LM type of the installed transformers, and its models are deterministic and hard."""

import torch

from tests.model_zoo import NOT_BUILT, SHRINKERS, TYPES, tiny_model


def test_its_tables_name_types_that_exist_and_either_build_or_do_not() -> None:
    assert SHRINKERS.keys() <= set(TYPES) and NOT_BUILT.keys() <= set(TYPES)
    assert not SHRINKERS.keys() & NOT_BUILT.keys() and all(NOT_BUILT.values())


def test_a_model_is_the_same_each_time_and_its_attention_is_peaked() -> None:
    first, second = tiny_model("qwen2"), tiny_model("qwen2")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    attention = first(torch.arange(2, 42).unsqueeze(0), output_attentions=True).attentions[0]
    assert attention.amax(-1).mean() > 0.3 and first.model.layers[0].self_attn.k_proj.bias.abs().min() > 0
