"""A part of all causal-LM types, one of each property; `make test-families` tries them all."""

import pytest

from tests.engine.prefix_sharing.sweep import try_sharing
from tests.family_table import read_table
from tests.model_zoo import tiny_model

# Tables of positions and RoPE of all kinds, latent attention, experts, soft-caps, sinks, windows, shared keys, images.
SHARED = (
    "bert ctrl dbrx deepseek_v3 diffllama gemma2 gemma3 gemma3n_text gpt2 gpt_bigcode gpt_neox gpt_oss granitemoe "
    "jetmoe llama longcat_flash minicpm3 ministral3 mixtral modernbert-decoder moshi opt persimmon phi3 "
    "phi4_multimodal qwen2_moe roc_bert"
).split()
REFUSED = {
    "bart": "other hidden states than their rows",
    "bloom": "attention interface",
    "deepseek_v32": "indexed_attention",
    "doge": "a mask of its own",
    "jamba": "linear_attention",
    "llama4_text": "a head",
    "nemotron": "do not hand a tree on",
    "roberta": "other hidden states than their rows",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_is_equal(name: str) -> None:
    assert try_sharing(tiny_model(name)) is None
    assert read_table()["types"][name]["sharing"] == "equal"


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str) -> None:
    reason = try_sharing(tiny_model(name))
    assert reason is not None and REFUSED[name] in reason and "\n" not in reason
    assert read_table()["types"][name]["sharing"] == "refused"
