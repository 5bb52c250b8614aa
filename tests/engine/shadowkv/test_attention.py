"""A hand-off that is lost raises and names the class; it never gives a wrong answer."""

import sys
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig
from tests.engine.shadowkv.families import tiny_model

IDS = torch.arange(2, 42).unsqueeze(0)
EVERYTHING = ShadowKVConfig(rank_energy=1.0, budget_fraction=1.0, dense_threshold=0, local_tokens=8)


def test_an_attention_that_the_user_sets_meanwhile_is_the_models_own_and_stays() -> None:
    model = tiny_model("llama")
    with ShadowKVCache.for_model(model) as cache, torch.no_grad():
        expected = model(IDS, past_key_values=cache).logits
        cache.reset()
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(IDS, past_key_values=cache).logits, expected)
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_of_another_model_raises() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    with ShadowKVCache.for_model(model) as cache:
        with pytest.raises(RuntimeError, match="with the model it was made for"):
            other(IDS, past_key_values=cache)
        with ShadowKVCache.for_model(other), pytest.raises(ValueError, match="made for another model"):
            other(IDS, past_key_values=cache)


def test_a_closed_cache_raises() -> None:
    model = tiny_model("llama")
    cache = ShadowKVCache.for_model(model)
    cache.close()
    with pytest.raises(RuntimeError, match="use the cache inside"):
        model(IDS, past_key_values=cache)


def test_a_model_that_copies_its_keys_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with ShadowKVCache.for_model(model) as cache:
        update = cache.update
        monkeypatch.setattr(cache, "update", lambda *args, **kw: tuple(x.clone() for x in update(*args, **kw)))
        with pytest.raises(RuntimeError, match="LlamaAttention copies its keys"), torch.no_grad():
            model(IDS, past_key_values=cache)


def test_a_model_with_attention_of_its_own_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    modeling = sys.modules[type(model).__module__]

    class OwnAttention:
        def get_interface(self, *_: Any) -> Any:
            return modeling.eager_attention_forward

    with ShadowKVCache.for_model(model) as cache, torch.no_grad():
        monkeypatch.setattr(modeling, "ALL_ATTENTION_FUNCTIONS", OwnAttention())
        with pytest.raises(RuntimeError, match="LlamaAttention did not hand its keys"):
            model(IDS, past_key_values=cache)


def test_an_interrupted_forward_is_noticed_and_reset_recovers() -> None:
    model = tiny_model("llama")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with ShadowKVCache.for_model(model) as cache, torch.no_grad():
        expected = model(IDS, past_key_values=cache).logits
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(IDS[:, :1], past_key_values=cache)
        hook.remove()
        with pytest.raises(RuntimeError, match=r"cache\.reset\(\)"):
            model(IDS[:, :1], past_key_values=cache)
        cache.reset()
        assert torch.equal(model(IDS, past_key_values=cache).logits, expected)


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("deepseek_v3", dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1), "latent"),
        ("t5", dict(d_model=64, d_kv=16, num_heads=4), "encoder-decoder"),
        (
            "qwen3_next",
            dict(head_dim=16, num_experts=4, num_experts_per_tok=2),
            "layers of type 'linear_attention'",
        ),
        ("gemma3_text", dict(head_dim=16, use_bidirectional_attention=True), "attend to later ones"),
        ("llama", dict(is_causal=False), "attend to later ones"),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(family: str, overrides: Any, reason: str) -> None:
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model(family, **sizes, num_key_value_heads=4, moe_intermediate_size=32, **overrides)
    with torch.device("meta"):
        if family == "t5":
            from transformers import T5ForConditionalGeneration

            model = T5ForConditionalGeneration(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"does not support .*{reason}"):
        ShadowKVCache.for_model(model)


def test_an_interrupted_forward_is_told_every_time_and_cannot_be_cropped_away() -> None:
    model = tiny_model("llama")

    def stop(*_: Any) -> None:
        raise InterruptedError

    with ShadowKVCache.for_model(model) as cache, torch.no_grad():
        model(IDS, past_key_values=cache)
        hook = model.model.layers[1].self_attn.register_forward_pre_hook(stop)
        with pytest.raises(InterruptedError):
            model(IDS[:, :1], past_key_values=cache)
        hook.remove()
        for call in (
            lambda: model(IDS[:, :1], past_key_values=cache),
            lambda: model.model(IDS[:, :1], past_key_values=cache),
            lambda: model.generate(IDS, past_key_values=cache, max_new_tokens=2),
            lambda: cache.crop(-1),
        ):
            with pytest.raises(RuntimeError, match=r"interrupted forward: cache\.reset"):
                call()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # gemma's first layer is transformers' own
def test_a_call_that_is_put_right_after_a_refusal_gives_the_stock_caches_logits(family: str) -> None:
    model: Any = tiny_model(family)
    ids, more = IDS.repeat(2, 1), IDS[:, :5].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    positions = (longer.cumsum(1) - 1)[:, -5:]
    stock = DynamicCache(config=model.config)
    with ShadowKVCache.for_model(model, EVERYTHING) as cache, torch.no_grad():
        for each in (stock, cache):
            model(ids, attention_mask=mask, past_key_values=each)
        for wrong in (None, torch.ones_like(longer), mask):
            with pytest.raises(ValueError, match="mask of the earlier turns"):
                model(more, attention_mask=wrong, past_key_values=cache)
        with pytest.raises(ValueError, match="holds 2 sequences"):
            model(more[:1], past_key_values=cache)
        expected, actual = (
            model(more, attention_mask=longer, position_ids=positions, past_key_values=each).logits
            for each in (stock, cache)
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_a_backward_through_the_cache_raises() -> None:
    model: Any = tiny_model("llama")
    with ShadowKVCache.for_model(model) as cache:
        loss = model(IDS, past_key_values=cache, labels=IDS).loss
        with pytest.raises(RuntimeError, match="has no gradients"):
            loss.backward()
    model.zero_grad()
    model.model.requires_grad_(False)
    with ShadowKVCache.for_model(model) as cache:
        model(IDS, past_key_values=cache, labels=IDS).loss.backward()
    expected = torch.autograd.grad(model(IDS, labels=IDS).loss, model.lm_head.weight)[0]
    torch.testing.assert_close(model.lm_head.weight.grad, expected, rtol=0, atol=1e-6)
