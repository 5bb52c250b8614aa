"""ShadowKV's share of the budget, and the rows of the quality tables on a tiny model."""

import pytest
import torch

from bench.methods import FULL_ATTENTION, DecodePlan, Method, all_methods, open_cache, shadowkv_config
from bench.quality import check_full_size, decode_greedily, feed, prefill
from bench.synthetic import ModelShape
from longshadow import ShadowKVCache

SHAPE = ModelShape(
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_size=64,
    intermediate_size=64,
    vocab_size=96,
    rope_theta=10_000.0,
)
PROMPT, TURN, STEPS = 600, 20, 12
PLAN = DecodePlan(prompt_tokens=PROMPT, turn_tokens=TURN, steps=STEPS)


@pytest.fixture(scope="module")
def model():
    return SHAPE.model(dtype=torch.float32, device="cpu", seed=0, max_positions=1024)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 96, (PROMPT + TURN + STEPS,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def test_every_fraction_has_the_baselines():
    rows = [(method.name, method.fraction) for method in all_methods((1 / 8, 1 / 16), (64, 32))]
    assert rows[0] == (FULL_ATTENTION, 1.0)
    ours = {"ShadowKV rank 64", "ShadowKV rank 32", "ShadowKV exact keys", "ShadowKV as published, rank 64"}
    for wanted in (1 / 8, 1 / 16):
        names = {name for name, fraction in rows if fraction == wanted}
        assert names == ours | {"oracle top-k", "Quest", "SnapKV", "StreamingLLM"}


@pytest.mark.parametrize(
    "method", [method for method in all_methods((1 / 4,), (8,)) if method.is_shadowkv], ids=lambda method: method.name
)
def test_shadowkv_attends_to_the_fraction_asked_for(model, tokens, method):
    shared, _ = prefill(model, tokens[:PROMPT])
    with open_cache(model, shared, method, PLAN) as (cache, shares):
        assert isinstance(cache, ShadowKVCache)
        feed(model, cache, tokens[PROMPT : PROMPT + TURN])
        for token in tokens[-STEPS:]:
            feed(model, cache, [token])
        # Half a chunk is the precision of a budget in chunks.
        assert shares().attended == pytest.approx(1 / 4, abs=0.51 * cache.config.chunk_size / PROMPT)
        assert (shares().scored == shares().attended) == method.as_published


def test_the_tail_of_a_long_continuation_follows_the_segments(model, tokens):
    method = Method(name="ShadowKV exact keys", fraction=1 / 4, key_store="exact")
    plan = DecodePlan(prompt_tokens=300, steps=300)
    assert plan.segment_tokens(plan.mean_context() / 4) == 64
    assert plan.segment_tokens(plan.mean_context()) == 128
    shared, _ = prefill(model, tokens[:300])
    with open_cache(model, shared, method, plan) as (cache, shares):
        for token in tokens[300:600]:
            feed(model, cache, [token])
        assert shares().attended == pytest.approx(1 / 4, abs=0.02)


def test_a_budget_below_what_is_always_attended_is_refused():
    with pytest.raises(ValueError, match="nothing to select"):
        shadowkv_config(Method(name="ShadowKV exact keys", fraction=1 / 32, key_store="exact"), PLAN)


def test_the_check_of_the_machinery(model, tokens):
    check = check_full_size(model, tokens[:PROMPT], tokens[PROMPT])
    assert check.passed and check.max_error < 1e-4


def test_greedy_decoding_stops(model, tokens):
    shared, logits = prefill(model, tokens[:50])
    plan = DecodePlan(prompt_tokens=50, steps=5)
    with open_cache(model, shared, Method(name=FULL_ATTENTION, fraction=1.0), plan) as (cache, shares):
        first = int(logits.argmax())
        assert decode_greedily(model, cache, logits, steps=5, stop=first) == [first]
        assert len(decode_greedily(model, cache, logits, steps=5, stop=None)) == 5
        assert shares().attended == 1.0
