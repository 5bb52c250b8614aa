"""The cache as a user meets it: turns, chunked prefill, beams, memory, leaving, refusals."""

import gc
import logging
import weakref
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig
from longshadow.engine.shadowkv import layer as layer_module
from longshadow.engine.shadowkv.layer import ShadowKVLayer
from tests.engine.shadowkv.families import tiny_model

COMPRESSING = dict(rank=10, budget_tokens=24, num_outlier_chunks=2, local_tokens=8, dense_threshold=0)
EVERYTHING = dict(rank_energy=1.0, budget_tokens=4000, local_tokens=8, segment_tokens=64, dense_threshold=0)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


def prompt(num_tokens: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 128, (batch, num_tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, cache: Any, tokens: int = 12, **kwargs: Any) -> torch.Tensor:
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    output: torch.Tensor = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=tokens,
        **{"do_sample": False, **kwargs},
    )
    return output


@pytest.mark.parametrize("key_store", ["low_rank", "exact"])
@pytest.mark.parametrize("second_turn", [30, 600])
def test_turns_equal_the_stock_caches(llama: Any, second_turn: int, key_store: Any) -> None:
    stock = DynamicCache(config=llama.config)
    with ShadowKVCache.for_model(llama, ShadowKVConfig(**EVERYTHING, key_store=key_store)) as cache:
        tokens = {}
        for name, held in (("stock", stock), ("shadow", cache)):
            ids = generate(llama, prompt(130), held)
            ids = generate(llama, torch.cat([ids, prompt(second_turn, seed=2)], 1), held)
            tokens[name] = generate(llama, torch.cat([ids, prompt(5, seed=3)], 1), held)
        sizes = [segment.num_tokens for segment in cache.layers[0].sequences[0].segments]
    assert torch.equal(tokens["shadow"], tokens["stock"])
    assert sizes[0] == 120 and (sizes[1] >= 600 if second_turn == 600 else sizes[1] == 64)


def test_sparse_prompts_select_for_every_token(llama: Any) -> None:
    """With a budget that covers all, a sparse turn is exact; with a small one it attends to less."""
    expected = generate(llama, torch.cat([prompt(130), prompt(30, seed=2)], 1), DynamicCache(config=llama.config))
    for budget, equal in ((4000, True), (8, False)):
        config = ShadowKVConfig(**{**EVERYTHING, "budget_tokens": budget}, sparse_prompts=True, num_outlier_chunks=0)
        with ShadowKVCache.for_model(llama, config) as cache, torch.no_grad():
            llama(prompt(130), past_key_values=cache)
            logits = llama(prompt(30, seed=2), past_key_values=cache).logits[0, -1]
        assert (int(logits.argmax()) == int(expected[0, 160])) or not equal
        assert (cache.statistics().attended_fraction == 1.0) == equal


def test_chunks_that_the_configuration_does_not_know_of_are_noticed(
    llama: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(layer_module.logger, "propagate", True)
    with ShadowKVCache.for_model(llama, ShadowKVConfig(**COMPRESSING)) as cache:
        generate(llama, prompt(200), cache, prefill_chunk_size=80)
    assert "ShadowKVConfig(prefill_chunk_size=80)" in caplog.text


def test_the_chunk_size_comes_from_the_models_generation_config() -> None:
    model = tiny_model("llama")
    model.generation_config.prefill_chunk_size = 64
    with ShadowKVCache.for_model(model, ShadowKVConfig(**COMPRESSING)) as cache:
        assert cache.config.prefill_chunk_size == 64


@pytest.mark.parametrize("num_tokens", [150, 192])  # the last chunk shorter than the others, and full
def test_chunked_prefill_equals_one_pass(llama: Any, num_tokens: int) -> None:
    results = []
    for chunk in (None, 64):
        config = ShadowKVConfig(**COMPRESSING, prefill_chunk_size=chunk)
        with ShadowKVCache.for_model(llama, config) as cache:
            tokens = generate(llama, prompt(num_tokens, batch=2), cache, prefill_chunk_size=chunk)
            segment = cache.layers[1].sequences[1].segments[0]
            results.append((tokens, segment.num_tokens, segment.span(0, segment.num_chunks)[0]))
            assert cache.layers[0].sequences[0].parked is None
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][2], results[1][2], rtol=0, atol=1e-4)


def test_beam_search_equals_the_stock_caches(llama: Any) -> None:
    expected = generate(llama, prompt(130, batch=2), DynamicCache(config=llama.config), num_beams=3)
    with ShadowKVCache.for_model(llama, ShadowKVConfig(**EVERYTHING, resident_factor=1.5)) as cache:
        assert torch.equal(generate(llama, prompt(130, batch=2), cache, num_beams=3), expected)


def test_beams_share_segments(llama: Any) -> None:
    with ShadowKVCache.for_model(llama, ShadowKVConfig(**COMPRESSING)) as cache, torch.no_grad():
        llama(prompt(130), past_key_values=cache)
        one = cache.memory()
        cache.batch_repeat_interleave(4)
        four = cache.memory()
        llama(prompt(1, batch=4), past_key_values=cache)
    first, last = cache.layers[0].sequences[0], cache.layers[0].sequences[3]
    assert first.segments[0] is last.segments[0] and first.tail is not last.tail
    assert four.host == one.host and four.device["factors"] == one.device["factors"]
    assert four.device["tail"] == 4 * one.device["tail"]


def test_sampling_runs(llama: Any) -> None:
    with ShadowKVCache.for_model(llama, ShadowKVConfig(**COMPRESSING)) as cache:
        torch.manual_seed(0)
        assert generate(llama, prompt(130, batch=2), cache, do_sample=True).shape == (2, 142)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_the_stock_cache(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    ids = prompt(130)
    with torch.no_grad():
        stock = DynamicCache(config=model.config)
        model(ids[:, :-1], past_key_values=stock)
        expected = model(ids[:, -1:], past_key_values=stock).logits.float()
        with ShadowKVCache.for_model(model, ShadowKVConfig(**EVERYTHING)) as cache:
            model(ids[:, :-1], past_key_values=cache)
            actual = model(ids[:, -1:], past_key_values=cache).logits.float()
    assert (actual - expected).norm() < 10 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize(
    "stores",
    [
        dict(value_store="device"),
        dict(value_dtype="int8"),
        dict(factor_dtype="int8"),
        dict(factor_dtype="fp8"),
        dict(key_store="exact", value_dtype="int8"),
        dict(resident_factor=1),
        dict(candidate_factor=1),
        dict(query_weighted=False),
    ],
)
def test_stores_change_results_by_rounding_only(llama: Any, stores: dict[str, Any]) -> None:
    logits = []
    for extra in ({}, stores):
        with (
            ShadowKVCache.for_model(llama, ShadowKVConfig(**{**EVERYTHING, **extra})) as cache,
            torch.no_grad(),
        ):
            llama(prompt(130), past_key_values=cache)
            logits.append(llama(prompt(1, seed=5), past_key_values=cache).logits)
    tolerance = 0.1 if {"int8", "fp8"} & set(stores.values()) else 1e-5
    assert (logits[1] - logits[0]).norm() <= tolerance * logits[0].norm()


def all_tensors(value: Any, seen: set[int]) -> Any:
    """Every tensor reachable from a cache layer, found without the package's own accounting."""
    if id(value) in seen or isinstance(value, (torch.nn.Module, type)) or callable(value):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from chain.from_iterable(all_tensors(item, seen) for item in value.values())
    elif isinstance(value, (list, tuple)):
        yield from chain.from_iterable(all_tensors(item, seen) for item in value)
    elif hasattr(value, "__dict__"):
        yield from all_tensors(vars(value), seen)


@pytest.mark.parametrize(
    "stores",
    [
        {},
        dict(key_store="exact"),
        dict(value_dtype="int8", factor_dtype="int8"),
        dict(value_store="device", resident_factor=2),
        dict(prefill_chunk_size=65),
    ],
)
def test_memory_is_the_sum_of_the_tensors_bytes(llama: Any, stores: dict[str, Any]) -> None:
    config = ShadowKVConfig(**{**COMPRESSING, "segment_tokens": 64, **stores})
    with ShadowKVCache.for_model(llama, config) as cache, torch.no_grad():
        llama(prompt(130, batch=2), past_key_values=cache)
        for step in range(70):
            llama(prompt(1, batch=2, seed=step), past_key_values=cache)
        held = [
            tensor
            for layer in cache.layers
            for tensor in all_tensors([layer.sequences, vars(cache._state.positions), vars(cache.tokens)], set())
        ]
    distinct = {(tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes() for tensor in held}
    memory = cache.memory()
    assert memory.total_bytes == sum(distinct.values())
    values_on_host = stores.get("value_store") != "device"
    assert ("values" in memory.host) == values_on_host and ("values" in memory.device) != values_on_host


def test_exact_keys_die_layer_by_layer(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    update = ShadowKVLayer.update

    def watching(self: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal most
        alive.extend((weakref.ref(keys), weakref.ref(values)))
        most = max(most, sum(ref() is not None for ref in alive))
        return update(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(ShadowKVLayer, "update", watching)
    deep = tiny_model("llama", num_hidden_layers=4)
    with ShadowKVCache.for_model(deep, ShadowKVConfig(**COMPRESSING)) as cache, torch.no_grad():
        deep(prompt(400), past_key_values=cache)
    assert len(alive) == 8 and most == 2
    assert not any(ref() is not None for ref in alive)


def test_peak_is_the_compressed_size_and_one_layer() -> None:
    deep = tiny_model("llama", num_hidden_layers=8)
    with ShadowKVCache.for_model(deep, ShadowKVConfig(**COMPRESSING)) as cache, torch.no_grad():
        deep(prompt(900), past_key_values=cache)
    one_layer = 900 * 2 * 32 * 4
    report = cache.memory()
    # Token ids are noted when a forward has ended.
    peak, now = cache.memory(peak=True).total_bytes, report.total_bytes - report.device["token ids"]
    assert now + one_layer <= peak <= 1.3 * now + one_layer


def test_generated_tokens_cost_what_prompt_tokens_cost(llama: Any) -> None:
    config = ShadowKVConfig(rank=10, budget_tokens=24, num_outlier_chunks=8, dense_threshold=0, segment_tokens=256)
    with ShadowKVCache.for_model(llama, config) as cache, torch.no_grad():
        llama(prompt(1056), past_key_values=cache)
        llama(prompt(1), past_key_values=cache)
        before = cache.memory()
        for _ in range(512):
            llama(prompt(1), past_key_values=cache)
        after = cache.memory()
    grown = (after.total_bytes - before.total_bytes) / 512
    apart = before.device["tail"]
    assert grown == pytest.approx((before.total_bytes - apart) / 1024, rel=0.05)
    assert cache.statistics().num_tokens == 1057 + 512


def test_short_contexts_and_large_budgets_run_dense(llama: Any) -> None:
    for config in (ShadowKVConfig(), ShadowKVConfig(budget_tokens=10**9)):
        with ShadowKVCache.for_model(llama, config) as cache:
            expected = generate(llama, prompt(300), DynamicCache(config=llama.config))
            assert torch.equal(generate(llama, prompt(300), cache), expected)
        assert cache.statistics().attended_fraction == 1.0 and not cache.layers[0].sequences[0].segments


def test_from_exact_equals_an_own_prefill(llama: Any) -> None:
    config = ShadowKVConfig(**COMPRESSING)
    logits = []
    with torch.no_grad():
        exact = DynamicCache(config=llama.config)
        llama(prompt(130), past_key_values=exact)
        own = ShadowKVCache.for_model(llama, config)
        llama(prompt(130), past_key_values=own)
        energies = [torch.stack(layer.sequences[0].query_energy.tensors) for layer in own.layers]
        for cache in (own, ShadowKVCache.from_exact(llama, config, exact, energies)):
            logits.append(llama(prompt(1, seed=4), past_key_values=cache).logits)
            cache.close()
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)


def test_residents_change_nothing_but_what_is_fetched(llama: Any) -> None:
    config = ShadowKVConfig(**COMPRESSING, candidate_factor=2, segment_tokens=64)
    logits, hit_rates = [], []
    for resident_factor in (0, 1, 2.5):
        with (
            ShadowKVCache.for_model(llama, replace(config, resident_factor=resident_factor)) as cache,
            torch.no_grad(),
        ):
            llama(prompt(300, batch=2), past_key_values=cache)
            steps = [llama(prompt(1, batch=2, seed=step), past_key_values=cache).logits for step in range(80)]
        logits.append(torch.cat(steps, 1))
        hit_rates.append(cache.statistics().hit_rate)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-4)
    assert hit_rates[0] == 0 < hit_rates[1] < hit_rates[2]


def test_more_candidates_find_more_of_the_attention(llama: Any) -> None:
    """With all keys as candidates the step attends to the tokens of the largest weight: the error shrinks."""
    ids = prompt(600)
    with torch.no_grad():
        stock = DynamicCache(config=llama.config)
        llama(ids, past_key_values=stock)
        expected = llama(prompt(1, seed=5), past_key_values=stock).logits
        errors = []
        for factor in (1, 3, 100):
            config = ShadowKVConfig(**{**COMPRESSING, "rank": 32, "budget_tokens": 96}, candidate_factor=factor)
            with ShadowKVCache.for_model(llama, config) as cache:
                llama(ids, past_key_values=cache)
                logits = llama(prompt(1, seed=5), past_key_values=cache).logits
            errors.append(float((logits - expected).norm()))
            statistics = cache.statistics()
            assert statistics.attended_fraction == pytest.approx((24 + 9 + 96) / 601)
            assert statistics.scored_fraction == pytest.approx(min(1, (24 + 9 + 96 * factor) / 601))
    assert errors[0] > errors[1] > errors[2]


def test_the_model_is_as_before_after_its_last_cache(llama: Any) -> None:
    def attributes() -> list[dict[str, Any]]:
        return [dict(vars(module)) for module in llama.modules()]

    before = attributes()
    first, second = ShadowKVCache.for_model(llama), ShadowKVCache.for_model(llama)
    inner = ShadowKVCache.for_model(llama.model)
    opened = attributes()
    assert opened != before
    first.close()
    first.close()
    assert attributes() == opened
    with second:
        pass
    assert attributes() != before
    inner.close()
    assert attributes() == before
    with first:
        assert attributes() != before
    dropped = ShadowKVCache.for_model(llama)
    del dropped
    gc.collect()
    assert attributes() == before


def test_several_caches_and_models_are_alive_at_once(llama: Any) -> None:
    other = tiny_model("qwen3")
    config = ShadowKVConfig(**COMPRESSING)
    alone = []
    for model in (llama, other):
        with ShadowKVCache.for_model(model, config) as cache:
            alone.append(generate(model, prompt(130), cache))
    caches = [ShadowKVCache.for_model(model, config) for model in (llama, other, llama)]
    with torch.no_grad():
        caches_tokens = [
            generate(model, prompt(130), cache) for model, cache in zip((llama, other, llama), caches, strict=True)
        ]
    assert torch.equal(caches_tokens[0], alone[0]) and torch.equal(caches_tokens[2], alone[0])
    assert torch.equal(caches_tokens[1], alone[1])
    for cache in caches:
        cache.close()


def test_other_calls_of_an_open_model_stay_exact(llama: Any) -> None:
    ids, mask = prompt(60, batch=2), torch.ones(2, 60, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad():
        expected = llama(ids, attention_mask=mask).logits
        with ShadowKVCache.for_model(llama):
            actual = llama(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


def test_reset_starts_over(llama: Any) -> None:
    with ShadowKVCache.for_model(llama, ShadowKVConfig(**COMPRESSING)) as cache:
        first = generate(llama, prompt(130), cache)
        cache.reset()
        assert cache.memory().total_bytes == 0 and cache.get_seq_length() == 0
        assert torch.equal(generate(llama, prompt(130), cache), first)


def test_rank_out_of_range_is_refused_when_the_cache_is_made(llama: Any) -> None:
    before = llama.config._attn_implementation
    with pytest.raises(ValueError, match="between 1 and KV heads x head_dim = 32"):
        ShadowKVCache.for_model(llama, ShadowKVConfig(rank=33))
    assert llama.config._attn_implementation == before


def test_a_mask_that_hides_cached_tokens_is_refused(llama: Any) -> None:
    with ShadowKVCache.for_model(llama) as cache, torch.no_grad():
        llama(prompt(40), past_key_values=cache)
        mask = torch.ones(1, 50, dtype=torch.long)
        mask[0, :5] = 0
        with pytest.raises(ValueError, match="pass the mask of the earlier turns"):
            llama(prompt(10), attention_mask=mask, past_key_values=cache)


def test_training_is_refused(llama: Any) -> None:
    with ShadowKVCache.for_model(llama) as cache:
        llama.train()
        try:
            with pytest.raises(RuntimeError, match="for inference"):
                llama(prompt(40), past_key_values=cache)
        finally:
            llama.eval()
