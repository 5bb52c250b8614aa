"""A model's generation_config rules wherever a request does not say, as in `model.generate`."""

import logging
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from longshadow import LLM, SamplingParams
from longshadow.engine.runtime.loading import end_tokens
from longshadow.engine.runtime.model_defaults import ModelDefaults
from longshadow.engine.runtime.sampling import Sampler
from longshadow.generation import Sampling, generate
from longshadow.models import LoadedModel
from tests.engine.runtime.engines import CHAT_TEMPLATE, engine, peaked_model, small_config
from tests.tiny_models import MAX_POSITIONS, tiny_tokenizer

EXACT = small_config(dense_threshold=10**6)
PROMPT = list(b"one two three one two three one two")
NUM_NEW = 14
CHOICES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "not sampled": {"do_sample": False, "temperature": 0.3, "top_p": 0.5, "top_k": 4},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[18], [33], [103, 104]]},
    "suppressed": {"suppress_tokens": list(range(10, 120)), "begin_suppress_tokens": [200, 201]},
    "sequence_bias": {"sequence_bias": [[[103], 9.0], [[103, 105], 9.0]]},
    "least length": {"eos_token_id": list(range(1, 200)), "min_new_tokens": 6},
    "end tokens": {"eos_token_id": [0, *range(50, 90)]},
    "the likeliest by sampling": {"do_sample": True, "top_k": 1, "repetition_penalty": 1.3},
    "ways to run": {"use_cache": False, "cache_implementation": "static", "num_return_sequences": 1},
    "guesses ahead": {"prompt_lookup_num_tokens": 3},
    "outputs": {"output_attentions": True, "output_scores": True, "output_hidden_states": True},
    "the likeliest by top_p": {"do_sample": True, "temperature": 0.4, "top_p": 1e-6},
}


def chosen(choice: str) -> LoadedModel:
    """The tiny model, whose generation_config has these values."""
    model, tokenizer = peaked_model(), tiny_tokenizer(CHAT_TEMPLATE)
    model.generation_config.update(**CHOICES[choice])
    return LoadedModel(name="tiny", model=model, tokenizer=tokenizer, max_positions=MAX_POSITIONS)


def command_line(loaded: LoadedModel) -> list[int]:
    return generate(
        loaded,
        torch.tensor([PROMPT]),
        Sampling(max_new_tokens=NUM_NEW),
        shadow=EXACT,
        on_text=lambda text: None,
        on_prefill=lambda done, layers: None,
    ).tokens


@pytest.mark.parametrize("choice", CHOICES)
def test_every_way_gives_the_tokens_of_the_models_own_generate(choice: str) -> None:
    loaded = chosen(choice)
    model: Any = loaded.model
    ids = torch.tensor([PROMPT])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, pad_token_id=0)
    ways = {"command line": command_line(loaded)}
    with engine(model=model, shadowkv=EXACT) as llm:
        ways["LLM"] = llm.generate(PROMPT, SamplingParams(max_tokens=NUM_NEW))[0].outputs[0].token_ids
    assert ways == dict.fromkeys(ways, expected[0, len(PROMPT) :].tolist())


def test_what_is_not_supported_is_left_out_on_the_command_line_too(caplog: pytest.LogCaptureFixture) -> None:
    loaded = chosen("nothing")
    unsupported = {"num_beams": 3, "dola_layers": "low", "force_words_ids": [[5]], "token_healing": True}
    more = {"num_return_sequences": 2, "penalty_alpha": 0.6, "guidance_scale": 1.5, "forced_eos_token_id": 7}
    plain = command_line(loaded)
    for name, value in {**unsupported, **more}.items():
        setattr(loaded.model.generation_config, name, value)
    with caplog.at_level(logging.WARNING):
        assert command_line(loaded) == plain
    for name in unsupported:
        assert f"generation_config has {name} = " in caplog.text


def test_a_request_that_says_otherwise_wins() -> None:
    loaded = chosen("repetition_penalty")
    model: Any = loaded.model
    model.generation_config.update(do_sample=True, temperature=5.0, max_new_tokens=5)
    ids = torch.tensor([PROMPT])
    plain = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, repetition_penalty=1.0
    )
    with engine(model=model, shadowkv=EXACT) as llm:
        told = SamplingParams(max_tokens=9, temperature=0, repetition_penalty=1.0)
        assert llm.generate(PROMPT, told)[0].outputs[0].token_ids == plain[0, len(PROMPT) :].tolist()
        [most] = llm.generate(PROMPT, SamplingParams(max_tokens=None))
        assert len(most.outputs[0].token_ids) == 5
        assert tokens(llm, seed=1) != tokens(llm, seed=2)


def tokens(llm: LLM, seed: int) -> list[int]:
    return llm.generate(PROMPT, SamplingParams(seed=seed))[0].outputs[0].token_ids


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        {"top_k": 7, "min_p": 0.05},
        {"temperature": 1.3, "top_h": 0.7, "typical_p": 0.9},
        {"epsilon_cutoff": 0.01, "eta_cutoff": 0.02},
        {"top_p": 0.0},
        {"sequence_bias": [[[3], -4.0]], "no_repeat_ngram_size": 1, "exponential_decay_length_penalty": [1, 1.5]},
    ],
)
def test_scores_are_those_of_transformers(values: dict[str, Any]) -> None:
    model: Any = peaked_model()
    # Where a model names no top_k, transformers would take 50.
    model.generation_config.update(do_sample=True, eos_token_id=[2, 9], **{"top_k": 0, **values})
    defaults = ModelDefaults.of(model, end_tokens(model, None))
    prompt, answer = [1, 2, 3, 4], [3, 5]
    sampler = Sampler.of(
        defaults.fill(SamplingParams(), room=100),
        index=0,
        prompt=prompt,
        end_tokens=defaults.end_tokens,
        device=torch.device("cpu"),
        defaults=defaults,
    )
    config, _ = model._prepare_generation_config(None)
    model._prepare_special_tokens(config, device="cpu")
    stock = model._get_logits_processor(config, input_ids_seq_length=len(prompt), device="cpu")
    assert isinstance(stock, LogitsProcessorList) and len(stock)
    scores = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.tensor([prompt + answer])
    ours = sampler.warpers(ids, sampler.penalties(ids, scores.clone()))  # type: ignore[arg-type]
    assert torch.equal(ours, stock(ids, scores.clone()))


def test_what_is_not_done_is_said_and_what_is_impossible_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = peaked_model()
    model.generation_config.update(num_beams=4, guidance_scale=1.5, penalty_alpha=0.0)
    with caplog.at_level(logging.WARNING), engine(model=model) as llm:
        assert llm.generate(PROMPT)[0].finished
    said = [record.getMessage() for record in caplog.records if "generation_config" in record.getMessage()]
    assert [message.split(" = ")[0].split()[-1] for message in said] == ["num_beams", "guidance_scale"]
    model = peaked_model()
    model.generation_config.repetition_penalty = -1.0
    with pytest.raises(ValueError, match="generation_config cannot be used: repetition_penalty must be"):
        engine(model=model)
    assert model.config._attn_implementation != "longshadow"


def test_an_open_length_is_what_the_memory_allows() -> None:
    with engine(max_model_len=60) as llm:
        [whole] = llm.generate(PROMPT, SamplingParams(max_tokens=None))
        assert len(PROMPT) + len(whole.outputs[0].token_ids) == llm.max_model_len
    with engine(prefix_cache=False) as llm:
        need = llm._accounting.need(len(PROMPT), 30).prefill
        llm._engine.budget.device_limit = llm._engine.holdings.held.device + need.device + need.host
        [short] = llm.generate(PROMPT, SamplingParams(max_tokens=None))
        assert 25 <= len(short.outputs[0].token_ids) < 200
