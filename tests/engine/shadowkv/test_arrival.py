"""A cache that is given is used, or a call raises; a text that goes on begins with what is cached."""

import copy
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig
from tests.engine.shadowkv.families import tiny_model
from tests.model_zoo import tiny_model as zoo_model

EVERYTHING = ShadowKVConfig(rank_energy=1.0, budget_fraction=1.0, dense_threshold=0, local_tokens=8, segment_tokens=64)
ORIGINAL = 48
LONG_ROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0] * 8,
    long_factor=[2.0 + i for i in range(8)],
    original_max_position_embeddings=ORIGINAL,
)


def tokens(num: int, seed: int = 3, batch: int = 1) -> torch.Tensor:
    return torch.randint(2, 128, (batch, num), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, cache: Any, num: int = 8, **options: Any) -> Any:
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num) | options
    return model.generate(input_ids=ids, past_key_values=cache, **options)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module", params=["phi3", "phimoe", "llama"])
def long_rope(request: pytest.FixtureRequest) -> Any:
    scales = dict(short_mscale=1.0, long_mscale=1.2) if request.param == "phimoe" else {}
    return zoo_model(
        request.param,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=LONG_ROPE | scales,
        sliding_window=None,
    )


@pytest.mark.parametrize("num_prompt", [20, ORIGINAL - 4, ORIGINAL, 100])
def test_long_rope_before_at_and_beyond_its_original_length(long_rope: Any, num_prompt: int) -> None:
    """Where the stock cache is dropped and the text read again, this one is read again, too."""
    answers = {}
    for name in ("stock", "shadow"):
        cache = (
            DynamicCache(config=long_rope.config) if name == "stock" else ShadowKVCache.for_model(long_rope, EVERYTHING)
        )
        first = generate(long_rope, tokens(num_prompt), cache, 12, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, tokens(9, seed=4)], 1)
        answers[name] = generate(long_rope, turn, first.past_key_values)
        if name == "shadow":
            assert first.past_key_values is cache and cache.get_seq_length() == answers[name].shape[1] - 1
            assert torch.equal(cache.token_ids, answers[name][:, :-1])
            cache.close()
    assert torch.equal(answers["shadow"], answers["stock"])


def test_a_cache_that_is_dropped_in_the_middle_of_a_text_raises(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = type(llama).prepare_inputs_for_generation

    def drop(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(self, *args, **kwargs)
        if inputs["input_ids"].shape[1] == 1:
            inputs["past_key_values"] = None
        return inputs

    monkeypatch.setattr(type(llama), "prepare_inputs_for_generation", drop)
    with (
        ShadowKVCache.for_model(llama, EVERYTHING) as cache,
        pytest.raises(RuntimeError, match="LlamaForCausalLM dropped the ShadowKVCache"),
    ):
        generate(llama, tokens(30), cache)


def test_a_forward_that_ignores_the_cache_raises(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = type(llama).forward

    def ignore(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(llama), "forward", ignore)
    with ShadowKVCache.for_model(llama, EVERYTHING) as cache:
        with pytest.raises(RuntimeError, match="LlamaForCausalLM was given a ShadowKVCache and did not use it"):
            generate(llama, tokens(30), cache)
        assert cache.get_seq_length() == 0


def test_a_generation_of_its_own_that_ignores_the_cache_raises(llama: Any) -> None:
    def own(model: Any, input_ids: torch.Tensor, **_: Any) -> Any:
        return model(input_ids, use_cache=False).logits.argmax(-1)

    with (
        ShadowKVCache.for_model(llama, EVERYTHING) as cache,
        pytest.raises(RuntimeError, match="LlamaForCausalLM was given a ShadowKVCache and did not use it"),
    ):
        generate(llama, tokens(30), cache, custom_generate=own)


def test_asking_for_no_cache_beside_one_is_refused(llama: Any) -> None:
    with ShadowKVCache.for_model(llama, EVERYTHING) as cache:
        for call in (generate, lambda model, ids, given, **options: model(ids, past_key_values=given, **options)):
            with pytest.raises(ValueError, match="use_cache=False"):
                call(llama, tokens(30), cache, use_cache=False)
        with pytest.raises(ValueError, match="cache_implementation"):
            generate(llama, tokens(30), cache, cache_implementation="static")


def test_other_calls_and_copies_of_the_model_are_its_own(long_rope: Any) -> None:
    expected = generate(long_rope, tokens(40), None, 16)
    before = dict(vars(long_rope))
    with ShadowKVCache.for_model(long_rope, EVERYTHING) as cache:
        assert torch.equal(generate(long_rope, tokens(40), None, 16), expected)
        copied = copy.deepcopy(long_rope)
        assert not {"forward", "generate", "prepare_inputs_for_generation"} & vars(copied).keys()
        assert torch.equal(generate(copied, tokens(40), DynamicCache(config=copied.config), 16), expected)
        assert torch.equal(generate(long_rope, tokens(40), cache, 16, guidance_scale=1.0), expected)
    assert vars(long_rope).keys() == before.keys()


def test_guidance_keeps_its_second_cache(llama: Any) -> None:
    expected = generate(llama, tokens(40), DynamicCache(config=llama.config), guidance_scale=1.5)
    with ShadowKVCache.for_model(llama, EVERYTHING) as cache:
        assert torch.equal(generate(llama, tokens(40), cache, guidance_scale=1.5), expected)


def edited(ids: torch.Tensor, place: int) -> torch.Tensor:
    ids = ids.clone()
    ids[:, place] = ids[:, place] % 100 + 2
    return torch.cat([ids, tokens(5, seed=9, batch=len(ids))], 1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda ids: edited(ids, 17), "differs from what is cached at token 17 of sequence 0"),
        (lambda ids: tokens(90, seed=8), "differs from what is cached at token [01] of sequence 0"),
        (lambda ids: ids[:, :30], r"has 30 tokens, and 47 are cached: .*crop\(-18\)"),
        (lambda ids: edited(ids[:, :30], 20), "at token 20 of sequence 0"),
    ],
)
def test_a_text_that_was_edited_is_refused(llama: Any, change: Any, complaint: str) -> None:
    with ShadowKVCache.for_model(llama, EVERYTHING) as cache:
        ids = generate(llama, tokens(40), cache)
        with pytest.raises(ValueError, match=complaint):
            generate(llama, change(ids), cache)
        assert cache.get_seq_length() == 47
        cache.reset()
        other = change(ids)
        assert torch.equal(generate(llama, other, cache), generate(llama, other, None))


def test_the_same_prompt_again_after_a_crop(llama: Any) -> None:
    with ShadowKVCache.for_model(llama, ShadowKVConfig()) as cache:
        first = generate(llama, tokens(40), cache)
        cache.crop(39 - cache.get_seq_length())
        assert torch.equal(generate(llama, tokens(40), cache), first)


def test_other_ids_of_padding_are_no_edit(llama: Any) -> None:
    ids, mask = tokens(40, batch=2), torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    with ShadowKVCache.for_model(llama, EVERYTHING) as cache:
        answered = generate(llama, ids, cache, attention_mask=mask)
        answered[0, :7] = 5
        mask = torch.cat([mask, torch.ones(2, 13, dtype=torch.long)], 1)
        turn = torch.cat([answered, tokens(5, seed=9, batch=2)], 1)
        found = generate(llama, turn, cache, attention_mask=mask)
    assert torch.equal(found, generate(llama, turn, None, attention_mask=mask))


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_prompts_that_peft_learned_give_the_stock_caches_tokens(kind: str) -> None:
    peft = pytest.importorskip("peft")
    made = {"prompt": peft.PromptTuningConfig, "p-tuning": peft.PromptEncoderConfig}[kind]
    base = tiny_model("llama")
    model = peft.get_peft_model(base, made(task_type="CAUSAL_LM", num_virtual_tokens=9)).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(0, 3)
    expected = generate(model, tokens(60), DynamicCache(config=base.config))
    with ShadowKVCache.for_model(model, EVERYTHING) as cache:
        assert torch.equal(generate(model, tokens(60), cache), expected)
        assert cache.get_seq_length() == 9 + 60 + 7 and cache.token_ids is None


def test_prefix_tuning_is_refused_when_the_cache_is_made_and_when_it_is_used() -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model("llama")
    model = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9)).eval()
    with pytest.raises(ValueError, match="prefix tuning"):
        ShadowKVCache.for_model(model)
    with ShadowKVCache.for_model(base) as cache, pytest.raises(ValueError, match="prefix tuning"):
        generate(model, tokens(30), cache)
