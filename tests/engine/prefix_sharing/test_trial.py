"""What a trial finds out about a model: how it counts positions, which module computes, and what it cannot do."""

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from longshadow import PrefixTree, share_prefixes
from longshadow.engine.prefix_sharing.backbone import check_sharing
from tests.engine.prefix_sharing.batches import pad
from tests.engine.prefix_sharing.test_backbone import losses_and_gradients
from tests.model_zoo import tiny_model

PROMPTS = [[11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [31, 32, 33, 34, 35]]


def two_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two completions of each, as GRPO pads them: prompts on the left, completions on the right."""
    ids, mask = pad([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], side="left")
    answers, answered = pad([[41, 42], [43, 44, 45], [41, 42, 46], [47]])
    return torch.cat([ids, answers], 1), torch.cat([mask, answered], 1)


# Learned and sinusoidal tables, multi-query attention, a decoder within the base model; and frequencies that follow
# the batch's longest column, padding included.
LENGTHS = dict(max_position_embeddings=12, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0))
POSITIONS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "gpt2": ("gpt2", {}, "column"),
    "gpt_bigcode": ("gpt_bigcode", {}, "column"),
    "ctrl": ("ctrl", {}, "column"),
    "opt": ("opt", {}, "tokens"),
    "llama": ("llama", {}, "either"),
    "dynamic RoPE": ("llama", LENGTHS, "column"),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_positions_are_the_models_own(case: str) -> None:
    name, overrides, expected = POSITIONS[case]
    model = tiny_model(name, **overrides)
    assert check_sharing(model).positions == expected
    ids, mask = two_prompts()
    output, gradients = losses_and_gradients(model, ids, mask)
    model = tiny_model(name, **overrides)
    with share_prefixes(model) as report:
        actual, mine = losses_and_gradients(model, ids, mask)
    assert report.shared_batches == 1, report.reasons
    real = mask.bool()
    largest = float(output.logits[real].abs().max())
    torch.testing.assert_close(actual.logits[real], output.logits[real], rtol=0, atol=2e-5 * largest)
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(mine[key], gradient, rtol=0, atol=2e-5 * scale, msg=key)


def test_by_column_only_rows_that_begin_alike_share() -> None:
    ids, mask = pad([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7]], side="left")
    tree = PrefixTree.from_batch(ids, mask, positions="column")
    assert tree.padded_left and tree.num_tokens == 5 + 3
    positions = tree.positions[tree.node_of]
    assert torch.equal(positions[mask.bool()], torch.arange(4).expand(3, 4)[mask.bool()])
    assert PrefixTree.from_batch(ids, mask).num_tokens == 5


def test_either_keeps_columns_where_rows_do_not_meet() -> None:
    ids, mask = pad([[5, 6, 7, 8], [5, 6, 7], [9, 6, 7]], side="left")
    tree = PrefixTree.from_batch(ids, mask, positions="either")
    assert tree.num_tokens == 4 + 3
    positions = tree.positions[tree.node_of]
    assert torch.equal(positions[2, 1:], torch.arange(1, 4))
    assert (positions[0].diff() == 1).all() and (positions[1, 1:].diff() == 1).all()


def test_a_last_column_of_padding_counts_where_length_does() -> None:
    model = tiny_model("llama", **LENGTHS)
    ids, mask = pad([[5, 6, 7, 8], [5, 6, 7, 9]], extra=12)
    expected = tiny_model("llama", **LENGTHS)(ids, attention_mask=mask).logits
    with share_prefixes(model) as report:
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
    assert "its last column is padding, and the model's positions depend on the length of a batch" in report.reasons


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("roberta", "other hidden states than their rows"),
        ("nemotron", "do not hand a tree on to their attention"),
        ("doge", "makes a mask of its own"),
        ("bloom", "attention interface"),
        ("mamba", "linear_attention"),
    ],
)
def test_what_cannot_work_is_refused_at_once(name: str, reason: str) -> None:
    model = tiny_model(name)
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"cannot share prefixes: .*{reason}") as refusal, share_prefixes(model):
        pass
    assert "\n" not in str(refusal.value) and model.config._attn_implementation == implementation


def lora() -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama"), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)).eval()


def activated() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, alora_invocation_tokens=[13, 14])
    return get_peft_model(tiny_model("llama"), config).eval()


PER_ROW: dict[str, tuple[Any, dict[str, Any], str]] = {
    "an adapter for each row": (lora, dict(adapter_names=["default", "__base__"] * 2), "adapter_names"),
    "an adapter from a token on": (activated, {}, "alora_offsets"),
    "types of tokens": (
        lambda: tiny_model("gpt2"),
        dict(token_type_ids=torch.ones(4, 14, dtype=torch.long)),
        "token_type_ids",
    ),
    "positions": (lambda: tiny_model("llama"), dict(position_ids=torch.arange(14)[None]), "position_ids"),
}


@pytest.mark.parametrize("case", PER_ROW)
def test_what_belongs_to_rows_runs_the_ordinary_way(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, given, argument = PER_ROW[case]
    model = make()
    ids, mask = two_prompts()
    assert ids.shape == (4, 14)
    expected = model(input_ids=ids, attention_mask=mask, **given).logits
    with share_prefixes(model) as report, caplog.at_level(logging.WARNING):
        assert torch.equal(model(input_ids=ids, attention_mask=mask, **given).logits, expected)
    assert (report.shared_batches, report.ordinary_batches) == (0, 1)
    assert argument in next(iter(report.reasons)) and argument in caplog.text


def test_a_model_that_is_not_whole_is_tried_with_its_first_batch() -> None:
    """Sharded weights are there within their own forward only; positions are then taken to be columns."""
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_model("llama").config)
    assert check_sharing(model).positions == "column"


def test_a_model_that_gives_nan_where_padding_comes_first_is_tried_all_the_same() -> None:
    model = tiny_model("stablelm")
    model.set_attn_implementation("eager")
    model.double()
    ids, mask = pad([[5, 6, 7, 8], [5, 6]], side="left")
    assert model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].isnan().any()
    with pytest.raises(ValueError, match="do not hand a tree on"):
        check_sharing(model)
