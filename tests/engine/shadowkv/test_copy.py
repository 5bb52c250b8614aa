"""Copies of a cache go on independently, share what is compressed, and give the stock cache's tokens; so does crop."""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig
from tests.engine.shadowkv.families import tiny_model

EVERYTHING = ShadowKVConfig(rank_energy=1.0, budget_fraction=1.0, dense_threshold=0, local_tokens=16, segment_tokens=64)
COMPRESSING = ShadowKVConfig(rank=10, budget_tokens=16, dense_threshold=0, local_tokens=16, segment_tokens=64)
PROMPT = 130
COPIES = [copy.copy, copy.deepcopy, ShadowKVCache.copy]


def tokens(num: int, seed: int = 3, batch: int = 1) -> torch.Tensor:
    return torch.randint(2, 128, (batch, num), generator=torch.Generator().manual_seed(seed))


def ask(model: Any, cache: Any, text: torch.Tensor, question: int, **options: Any) -> torch.Tensor:
    """The answer to a question about a text."""
    ids = torch.cat([text, tokens(20, seed=question, batch=len(text))], 1)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False) | options
    return model.generate(ids, past_key_values=cache, **options)[:, ids.shape[1] :]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize("make", COPIES)
def test_one_text_many_questions(model: Any, make: Any) -> None:
    """The pattern of transformers' guide: prefill once, each question on a copy."""
    text = tokens(PROMPT)
    expected = [ask(model, DynamicCache(config=model.config), text, question) for question in (11, 12)]
    with ShadowKVCache.for_model(model, EVERYTHING) as cache:
        with torch.no_grad():
            model(text, past_key_values=cache)
        for question, answer in zip((11, 12), expected, strict=True):
            with make(cache) as copied:
                assert torch.equal(ask(model, copied, text, question), answer)
        assert cache.get_seq_length() == PROMPT, "a copy changed its original"
        assert torch.equal(ask(model, cache, text, 12), expected[1])


def test_a_copy_decodes_as_its_original_in_the_middle_of_an_answer(llama: Any) -> None:
    with ShadowKVCache.for_model(llama, COMPRESSING) as cache, torch.no_grad():
        llama(tokens(PROMPT, batch=2), past_key_values=cache)
        steps = tokens(90, seed=5, batch=2)
        for step in steps[:, :45].T:
            llama(step.unsqueeze(1), past_key_values=cache)
        with cache.copy() as copied:
            outputs = [
                torch.stack([llama(step.unsqueeze(1), past_key_values=each).logits for step in steps[:, 45:].T])
                for each in (cache, copied)
            ]
            assert torch.equal(*outputs)
            assert cache.statistics() == copied.statistics()
            assert len(copied.layers[0].sequences[0].segments) == 2, "no segment was made: the test is blind"


def test_copies_share_what_is_compressed(llama: Any) -> None:
    with ShadowKVCache.for_model(llama, COMPRESSING) as cache, torch.no_grad():
        llama(tokens(PROMPT), past_key_values=cache)
        with cache.copy() as copied:
            for ours, theirs in zip(cache.layers, copied.layers, strict=True):
                (sequence,), (other,) = ours.sequences, theirs.sequences
                assert all(a is b for a, b in zip(sequence.segments, other.segments, strict=True)) and sequence.segments
                assert not {part.data_ptr() for part in sequence.tail.tensors} & {
                    part.data_ptr() for part in other.tail.tensors
                }
            cache.reset()
            assert copied.get_seq_length() == PROMPT and copied.memory().device["factors"] > 0


def test_a_copy_is_open_as_its_original_is_and_closes_for_itself(llama: Any) -> None:
    cache = ShadowKVCache.for_model(llama, EVERYTHING)
    with torch.no_grad():
        llama(tokens(PROMPT), past_key_values=cache)
        copied = cache.copy()
        cache.close()
        llama(tokens(1), past_key_values=copied)
        with pytest.raises(RuntimeError, match="use"):
            llama(tokens(1), past_key_values=cache.copy())
        copied.close()
        with pytest.raises(RuntimeError, match="use"):
            llama(tokens(1), past_key_values=copied)
        cache.reset()
        with cache:
            llama(tokens(PROMPT), past_key_values=cache)
            dropped = cache.copy()
            del dropped
            gc.collect()
            llama(tokens(1), past_key_values=cache)


@pytest.mark.parametrize("save", [pickle.dumps, lambda cache: torch.save(cache, "/dev/null")])
def test_saving_is_refused_in_one_line(llama: Any, save: Any) -> None:
    with ShadowKVCache.for_model(llama) as cache, pytest.raises(pickle.PicklingError, match="cannot be saved"):
        save(cache)


def test_crop_takes_recent_tokens_back(model: Any) -> None:
    """Step by step, the stock cache cropped alike; the last layer of a hybrid model forgets with its window."""
    stock = DynamicCache(config=model.config)
    stock.activate_past_recording()
    text, steps = tokens(PROMPT, batch=2), tokens(6, seed=5, batch=2)
    mask = torch.ones_like(text)
    mask[0, :9] = 0
    with ShadowKVCache.for_model(model, EVERYTHING) as cache, torch.no_grad():
        cache.activate_past_recording()
        outputs: list[list[torch.Tensor]] = [[], []]
        for each, logits in zip((stock, cache), outputs, strict=True):
            seen = mask
            model(text, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0), past_key_values=each)
            for removed in (0, 1, 3):
                seen = torch.cat([seen, torch.ones_like(steps)], 1)
                positions = (seen.cumsum(1) - 1)[:, -steps.shape[1] :]
                output = model(steps, attention_mask=seen, position_ids=positions, past_key_values=each)
                logits.append(output.logits)
                each.crop(-removed)
                seen = seen[:, : seen.shape[1] - removed]
            assert each.get_seq_length() == PROMPT + 3 * 6 - 4
        torch.testing.assert_close(torch.stack(outputs[1]), torch.stack(outputs[0]), rtol=0, atol=1e-4)


def test_crop_says_where_a_segment_would_be_cut(llama: Any) -> None:
    with ShadowKVCache.for_model(llama, EVERYTHING) as cache, torch.no_grad():
        llama(tokens(PROMPT), past_key_values=cache)
        (recent,) = [PROMPT - sequence.num_compressed for sequence in cache.layers[0].sequences]
        for tokens_to_remove, complaint in (
            (-recent - 1, rf"only the last \[{recent}\] are not compressed"),
            (-PROMPT - 1, f"the cache holds {PROMPT}"),
            (5, "minus the number"),
        ):
            with pytest.raises(ValueError, match=complaint):
                cache.crop(tokens_to_remove)
        assert cache.get_seq_length() == PROMPT
        cache.crop(-recent)
        assert cache.get_seq_length() == PROMPT - recent


@pytest.mark.parametrize("options", [dict(prompt_lookup_num_tokens=3), dict(assistant=5)])
def test_assisted_decoding_gives_the_stock_caches_tokens(llama: Any, options: dict[str, Any]) -> None:
    if "assistant" in options:
        options = dict(assistant_model=tiny_model("llama", num_hidden_layers=1))
    text = tokens(10).repeat(1, 12)
    expected = ask(llama, DynamicCache(config=llama.config), text, 7, max_new_tokens=40, **options)
    with ShadowKVCache.for_model(llama, EVERYTHING) as cache:
        assert torch.equal(ask(llama, cache, text, 7, max_new_tokens=40, **options), expected)
        assert cache.statistics().energy_kept[0], "nothing was compressed: the test is blind"


def test_assisted_decoding_with_more_candidates_than_recent_tokens_says_so(llama: Any) -> None:
    config = ShadowKVConfig(rank_energy=1.0, dense_threshold=0, local_tokens=1, segment_tokens=64)
    text = tokens(4).repeat(1, 40)[:, :144]
    with ShadowKVCache.for_model(llama, config) as cache, pytest.raises(ValueError, match="cannot take back"):
        ask(llama, cache, text, 7, max_new_tokens=40, prompt_lookup_num_tokens=30)


def test_token_ids_are_what_forwards_brought(llama: Any) -> None:
    text = tokens(PROMPT, batch=2)
    with ShadowKVCache.for_model(llama, EVERYTHING) as cache:
        assert cache.token_ids is None
        output = llama.generate(text, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert torch.equal(cache.token_ids, output[:, :-1])
        with cache.copy() as copied:
            copied.crop(-2)
            assert torch.equal(copied.token_ids, output[:, :-3])
            copied.reorder_cache(torch.tensor([1, 1]))
            assert torch.equal(copied.token_ids, output[[1, 1], :-3])
        with torch.no_grad():
            llama(inputs_embeds=llama.get_input_embeddings()(text[:, :3]), past_key_values=cache)
        assert cache.token_ids is None
        cache.reset()
        llama.generate(text, past_key_values=cache, max_new_tokens=3, num_beams=3, do_sample=False)
        assert cache.token_ids.shape == (6, PROMPT + 2)
