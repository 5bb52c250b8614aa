"""Every baseline with everything selected is full attention; below that it attends to what it says."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bench.baselines.exact_cache import ExactLayer, exact_attention
from bench.baselines.selections import QUEST_PAGE_TOKENS, STREAMING_SINK_TOKENS, selection_makers
from bench.quality import feed, prefill

NAMES = list(selection_makers(1.0))
PROMPT, STEPS = 150, 40


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 128, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def one_by_one(model, cache, tokens):
    with exact_attention(model):
        return torch.stack([feed(model, cache, [token]) for token in tokens])


def as_a_block(model, cache, tokens):
    with exact_attention(model):
        return model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0]


def make_cache(model, tokens, name, fraction, *, teacher_forced=False):
    shared, _ = prefill(model, tokens[:PROMPT])
    return shared.fork(selection_makers(fraction)[name], teacher_forced=teacher_forced)


def test_the_shared_prefill_is_the_stock_cache(model, tokens):
    stock = DynamicCache()
    expected = feed(model, stock, tokens[:PROMPT])
    exact, logits = prefill(model, tokens[:PROMPT])
    torch.testing.assert_close(logits, expected)
    dynamic = exact.to_dynamic()
    for index, layer in enumerate(stock.layers):
        torch.testing.assert_close(dynamic.layers[index].keys, layer.keys)
        torch.testing.assert_close(dynamic.layers[index].values, layer.values)


def test_a_prefill_can_be_continued(model, tokens):
    document, _ = prefill(model, tokens[:100])
    continued, logits = prefill(model, tokens[100:PROMPT], document)
    whole, expected = prefill(model, tokens[:PROMPT])
    assert document.get_seq_length() == 100
    torch.testing.assert_close(logits, expected)
    for layer, other in zip(continued.layers, whole.layers, strict=True):
        torch.testing.assert_close(layer.recent_queries_HGWD, other.recent_queries_HGWD)


@pytest.mark.parametrize("name", NAMES)
def test_everything_selected_is_full_attention(model, tokens, name):
    stock = DynamicCache()
    feed(model, stock, tokens[:PROMPT])
    expected = torch.stack([feed(model, stock, [token]) for token in tokens[PROMPT:]])
    cache = make_cache(model, tokens, name, 1.0)
    torch.testing.assert_close(one_by_one(model, cache, tokens[PROMPT:]), expected)
    assert cache.attended_fraction == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_forced_block_is_token_by_token(model, tokens, name):
    steps = one_by_one(model, make_cache(model, tokens, name, 1 / 4), tokens[PROMPT:])
    block = as_a_block(model, make_cache(model, tokens, name, 1 / 4, teacher_forced=True), tokens[PROMPT:])
    torch.testing.assert_close(block, steps)


@pytest.mark.parametrize("name", NAMES)
def test_the_attended_fraction_is_the_one_asked_for(model, tokens, name):
    cache = make_cache(model, tokens, name, 1 / 4)
    one_by_one(model, cache, tokens[PROMPT:])
    granularity = QUEST_PAGE_TOKENS if name == "Quest" else 1
    assert cache.attended_fraction == pytest.approx(1 / 4, abs=granularity / PROMPT)


@pytest.mark.parametrize("name", NAMES)
def test_a_later_prompt_sees_everything_unless_it_was_evicted(model, tokens, name):
    expected = as_a_block(model, prefill(model, tokens[:PROMPT])[0], tokens[PROMPT:])
    cache = make_cache(model, tokens, name, 1 / 4)
    same = torch.allclose(as_a_block(model, cache, tokens[PROMPT:]), expected, atol=1e-5)
    assert same is not selection_makers(1.0)[name](cache.layers[0]).evicts


def test_a_fork_leaves_the_original_alone(model, tokens):
    shared, _ = prefill(model, tokens[:PROMPT])
    before = shared.layers[0].keys.clone()
    one_by_one(model, shared.fork(), tokens[PROMPT:])
    assert shared.get_seq_length() == PROMPT
    # What lies behind the tokens was never written, and may be NaN by chance.
    torch.testing.assert_close(shared.layers[0].keys, before, rtol=0, atol=0, equal_nan=True)


def select(name, fraction, queries, keys, layer):
    visible = torch.ones(1, keys.shape[1], dtype=torch.bool)
    return selection_makers(fraction)[name](layer).select(queries, keys, visible)[0, 0]


@pytest.fixture
def layer():
    """One layer, head and group: 64 keys of which only number 37 points where the queries do."""
    layer = ExactLayer()
    keys = torch.zeros(1, 1, 64, 4)
    keys[..., 0] = -1.0
    keys[0, 0, 37, 0] = 5.0
    layer.update(keys, keys)
    layer.recent_queries_HGWD = torch.tensor([2.0, 0.0, 0.0, 0.0]).expand(1, 1, 4, 4)
    return layer


@pytest.mark.parametrize("name", ["oracle top-k", "Quest", "SnapKV"])
def test_the_key_that_matters_is_selected(layer, name):
    mask = select(name, 1 / 4, layer.recent_queries_HGWD[:, :, -1:], layer.keys[0, :, :64], layer)
    assert mask[37] and int(mask.sum()) == 16


def test_the_window_and_the_sink_are_selected(layer):
    mask = select("StreamingLLM", 1 / 4, layer.recent_queries_HGWD[:, :, -1:], layer.keys[0, :, :64], layer)
    assert mask[:STREAMING_SINK_TOKENS].all() and mask[-12:].all() and int(mask.sum()) == 16
