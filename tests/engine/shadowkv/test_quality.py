"""Real weights: what SmolLM2 finds with a compressed cache (in full: `python -m bench run needle`)."""

from functools import cache as once
from typing import Any

import pytest
import torch

from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig

CODE = "7412"
FACT = f"\n\nThe special magic number for Aurora is {CODE}.\n\n"
QUESTION = "What is the special magic number for Aurora?"
ANSWER = "The special magic number for Aurora is"


@once
def prose() -> str:
    from pydoc_data.topics import topics

    return " ".join(" ".join(topics[name].split()) for name in ("compound", "dynamic-features", "execmodel"))


def encode(loaded: Any, text: str) -> list[int]:
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False).input_ids
    return ids


def say(loaded: Any, cache: Any, tokens: list[int], steps: int = 6) -> str:
    """Feeds tokens as one prompt and decodes greedily."""
    with torch.no_grad():
        fed, answer = tokens, []
        for _ in range(steps):
            logits = loaded.model(torch.tensor([fed]), past_key_values=cache, logits_to_keep=1).logits
            answer.append(int(logits[0, -1].argmax()))
            fed = answer[-1:]
    text: str = loaded.tokenizer.decode(answer)
    return text


@pytest.mark.slow
@pytest.mark.parametrize("in_second_turn", [False, True])
def test_a_needle_is_found_at_an_eighth_of_the_tokens(smollm2: Any, in_second_turn: bool) -> None:
    words = encode(smollm2, prose())[:1900]
    document = encode(smollm2, "<|im_start|>user\n") + words[:700] + encode(smollm2, FACT) + words[700:]
    question = encode(smollm2, f"\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    turns = [document, question] if in_second_turn else [document + question]
    config = ShadowKVConfig(budget_tokens=128, rank=64, num_outlier_chunks=4, dense_threshold=0)
    with ShadowKVCache.for_model(smollm2.model, config) as cache, torch.no_grad():
        for turn in turns:
            smollm2.model(torch.tensor([turn]), past_key_values=cache, logits_to_keep=1)
        # The answer's beginning is decoded token by token, each token sparse.
        for token in encode(smollm2, ANSWER):
            smollm2.model(torch.tensor([[token]]), past_key_values=cache, logits_to_keep=1)
        assert CODE in say(smollm2, cache, encode(smollm2, " "))
    assert cache.statistics().attended_fraction <= 1 / 8 + 0.02


@pytest.mark.slow
def test_a_fact_among_generated_tokens_is_remembered(smollm2: Any) -> None:
    """1,024 tokens are forced after a 2,000-token prompt, the fact at position 100; then it is asked for."""
    words = encode(smollm2, prose())
    prompt = encode(smollm2, "<|im_start|>user\n") + words[:1980] + encode(smollm2, "<|im_end|>\n")
    fact = encode(smollm2, FACT)
    generated = words[2000:2100] + fact + words[2100 : 3024 - len(fact)]
    question = f"<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{ANSWER}"
    config = ShadowKVConfig(budget_tokens=256, rank=64, dense_threshold=0)
    with ShadowKVCache.for_model(smollm2.model, config) as cache, torch.no_grad():
        smollm2.model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
        before = cache.memory()
        for token in generated:
            smollm2.model(torch.tensor([[token]]), past_key_values=cache, logits_to_keep=1)
        after = cache.memory()
        assert len(generated) == 1024 and cache.get_seq_length() == len(prompt) + 1024
        assert CODE in say(smollm2, cache, encode(smollm2, question))
    apart = before.device["tail"]
    per_prompt_token = (before.total_bytes - apart) / (len(prompt) - 32)
    grown = after.total_bytes - before.total_bytes
    assert grown / 1024 == pytest.approx(per_prompt_token, rel=0.05)
