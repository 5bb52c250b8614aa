"""Caches and shared prefixes in every situation: their own calls, all others meanwhile, and the model afterwards."""

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from longshadow import ShadowKVCache, ShadowKVConfig, share_prefixes
from longshadow.engine.switching.text_model import unwrapped
from tests.engine.prefix_sharing.batches import pad, pairs
from tests.engine.shadowkv.families import tiny_model
from tests.engine.switching.situations import SITUATIONS, Situation, every_implementation, set_attention

# Everything is attended, at full rank: what the stock cache gives.
WHOLE = ShadowKVConfig(
    rank_energy=1.0, budget_fraction=1.0, dense_threshold=0, local_tokens=8, segment_tokens=64, candidate_factor=1.0
)
IDS, MASK = pad(pairs())
ROW = IDS[:1, : int(MASK[0].sum())]


@pytest.fixture(autouse=True)
def _every_implementation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with every_implementation(monkeypatch):
        yield


@pytest.fixture(params=SITUATIONS)
def situation(request: pytest.FixtureRequest) -> Iterator[Situation]:
    chosen = SITUATIONS[request.param]
    torch._dynamo.reset()
    # flex_attention is compiled by transformers itself, in C++.
    stance = "default" if chosen.compiled else "force_eager"
    with torch.compiler.set_stance(stance):
        yield chosen


def model_of(situation: Situation) -> Any:
    model = tiny_model("llama", num_hidden_layers=1 if situation.compiled else 2)
    set_attention(model, situation.implementation)
    return situation.wrap(model)


def attributes(model: Any) -> list[dict[str, Any]]:
    """All that modules hold by themselves, configurations by what they say."""
    kept = []
    for module in unwrapped(model).modules():
        # transformers notes this at the first call that asks for attentions, and torch what it compiled.
        kept.append({name: value for name, value in vars(module).items() if not name.startswith("_output_capturing")})
    return kept


def ordinary_calls(model: Any, situation: Situation) -> list[torch.Tensor]:
    """Logits, attentions and gradients of calls that have nothing to do with a cache or a tree."""
    results = []
    with torch.set_grad_enabled(situation.learns):
        output = model(input_ids=ROW, attention_mask=torch.ones_like(ROW), use_cache=False)
    results.append(output.logits)
    if not situation.compiled:
        positions = torch.cat([torch.arange(20), torch.arange(ROW.shape[1] - 20)]).unsqueeze(0)
        with torch.no_grad():
            results.append(model(input_ids=ROW, position_ids=positions, use_cache=False).logits)
            # Sequences that are packed do not see one another.
            alone = model(input_ids=ROW[:, 20:], use_cache=False).logits
        torch.testing.assert_close(results[-1][:, 20:], alone, rtol=0, atol=1e-4)
    if situation.implementation == "eager":
        results += model(input_ids=ROW, use_cache=False, output_attentions=True).attentions
    if situation.learns:
        model.zero_grad()
        output.logits.square().mean().backward()
        results += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert len(results) > 3
    return [result.detach().clone() for result in results]


def cached_logits(model: Any, cache: Any) -> torch.Tensor:
    """Of a padded prompt and some tokens."""
    mask = torch.ones(2, 43, dtype=torch.long)
    mask[0, :9] = 0
    ids = torch.randint(2, 128, mask.shape, generator=torch.Generator().manual_seed(5))
    logits = []
    with torch.no_grad():
        for stop in (40, 41, 42, 43):
            start = cache.get_seq_length()
            positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:]
            logits.append(
                model(
                    input_ids=ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
            )
    return torch.stack(logits)


def stock_logits(model: Any) -> torch.Tensor:
    """By transformers' own cache; a graph for each of its shapes would take long, and is not ours."""
    with torch.compiler.set_stance("force_eager"):
        return cached_logits(model, DynamicCache(config=unwrapped(model).config))


def test_a_cache(situation: Situation) -> None:
    model = model_of(situation)
    ordinary = ordinary_calls(model, situation)
    expected = stock_logits(model)
    before = attributes(model)
    with ShadowKVCache.for_model(model, WHOLE) as cache, ShadowKVCache.for_model(unwrapped(model), WHOLE) as other:
        assert unwrapped(model).config._attn_implementation == situation.implementation
        actual = cached_logits(model, cache)
        meanwhile = ordinary_calls(model, situation)
        other.close()
        stock = stock_logits(model)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert all(map(torch.equal, meanwhile, ordinary)) and torch.equal(stock, expected)
    assert attributes(model) == before
    assert all(map(torch.equal, ordinary_calls(model, situation), ordinary))


def test_a_tree(situation: Situation) -> None:
    model = model_of(situation)
    ordinary = ordinary_calls(model, situation)
    real = MASK.bool()
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[real]
        before = attributes(model)
        with share_prefixes(model) as report:
            assert unwrapped(model).config._attn_implementation == situation.implementation
            actual = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[real]
            assert report.shared_batches == 1
            with torch.enable_grad():
                meanwhile = ordinary_calls(model, situation)
    assert report.shared_batches == 1 and report.ordinary_batches > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    # Beside a tree, ordinary batches run outside of graphs, too, so gradients add up in another order.
    allowed = 1e-6 if situation.compiled else 0
    for mine, own in zip(meanwhile, ordinary, strict=True):
        torch.testing.assert_close(mine, own, rtol=0, atol=allowed * max(1, float(own.abs().max())))
    assert attributes(model) == before
    assert all(map(torch.equal, ordinary_calls(model, situation), ordinary))


@pytest.mark.parametrize("duplicate", ["copy", "pickle", "torch.save"])
def test_copies_are_plain_models(duplicate: str) -> None:
    model = tiny_model("llama")
    before = [set(vars(module)) for module in model.modules()]
    with ShadowKVCache.for_model(model), share_prefixes(model) as report:
        if duplicate == "copy":
            other = copy.deepcopy(model)
        elif duplicate == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
    assert [set(vars(module)) for module in other.modules()] == before
    assert all(layer.self_attn.config is other.config for layer in other.model.layers)
    assert torch.equal(other(IDS, attention_mask=MASK).logits, model(IDS, attention_mask=MASK).logits)
    assert report.shared_batches == 0


def test_continuous_batching_beside_both() -> None:
    model = tiny_model("llama")
    prompts = [row[:10].tolist() for row in IDS[:3]]

    def tokens() -> list[list[int]]:
        config = dict(num_blocks=16, max_batch_tokens=64, block_size=16)
        from transformers import ContinuousBatchingConfig, GenerationConfig

        outputs = model.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(**config),
            progress_bar=False,
        )
        return [output.generated_tokens for _, output in sorted(outputs.items())]

    expected = tokens()
    stock = cached_logits(model, DynamicCache(config=model.config))
    with ShadowKVCache.for_model(model, WHOLE) as cache, share_prefixes(model) as report:
        assert tokens() == expected
        torch.testing.assert_close(cached_logits(model, cache), stock, rtol=0, atol=1e-4)
        model(IDS, attention_mask=MASK, use_cache=False)
    assert report.shared_batches == 1 and not report.reasons
    assert model.config._attn_implementation == "eager"


def test_an_implementation_that_is_set_meanwhile_is_used_and_stays() -> None:
    model = tiny_model("llama")
    real = MASK.bool()
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).logits
        stock = cached_logits(model, DynamicCache(config=model.config))
        with ShadowKVCache.for_model(model, WHOLE) as cache, share_prefixes(model) as report:
            model(IDS, attention_mask=MASK, use_cache=False)
            model.set_attn_implementation("sdpa")
            actual = model(IDS, attention_mask=MASK, use_cache=False).logits
            assert report.shared_batches == 2
            torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-4)
            torch.testing.assert_close(cached_logits(model, cache), stock, rtol=0, atol=1e-4)
            assert all(layer.self_attn.config._attn_implementation == "sdpa" for layer in model.model.layers)
    assert model.config._attn_implementation == "sdpa"


def test_hooks_that_come_and_go_meanwhile() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = tiny_model("llama")
    before = attributes(model)
    expected = cached_logits(model, DynamicCache(config=model.config))
    with ShadowKVCache.for_model(model, WHOLE) as cache:
        for module in model.modules():
            add_hook_to_module(module, ModelHook())
        torch.testing.assert_close(cached_logits(model, cache), expected, rtol=0, atol=1e-4)
        assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)
    assert torch.equal(cached_logits(model, DynamicCache(config=model.config)), expected)
    with ShadowKVCache.for_model(model, WHOLE) as cache:
        torch.testing.assert_close(cached_logits(model, cache), expected, rtol=0, atol=1e-4)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(cached_logits(model, DynamicCache(config=model.config)), expected)
    with ShadowKVCache.for_model(model, WHOLE) as cache:
        torch.testing.assert_close(cached_logits(model, cache), expected, rtol=0, atol=1e-4)
    assert [set(after) - {"forward"} for after in attributes(model)] == [set(kept) for kept in before]


def test_attentions_and_training_are_refused_with_the_reason() -> None:
    model = tiny_model("llama")
    with ShadowKVCache.for_model(model) as cache:
        with pytest.raises(ValueError, match="no attention weights to return"), torch.no_grad():
            model(IDS[:1], past_key_values=cache, output_attentions=True)
        assert cache.get_seq_length() == 0
        with pytest.raises(RuntimeError, match="for inference"):
            model.train()(IDS[:1], past_key_values=cache)
        assert cache.get_seq_length() == 0


def test_ordinary_calls_compile_as_one_graph_meanwhile() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with ShadowKVCache.for_model(model):
            actual = compiled(IDS, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
