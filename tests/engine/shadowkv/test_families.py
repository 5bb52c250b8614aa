"""Every family: equal to the stock cache with everything kept, to a dense computation with little."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig
from tests.engine.shadowkv.families import FAMILIES, DenseShadowKV, tiny_model

PROMPT_TOKENS, PADDING, STEPS = 203, 17, 64


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 128, (2, PROMPT_TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_and_budget_give_the_stock_caches_tokens(family: str) -> None:
    model = tiny_model(family)
    ids, mask = padded_batch()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False)
    config = ShadowKVConfig(rank_energy=1.0, budget_tokens=1000, dense_threshold=0, segment_tokens=64, local_tokens=8)
    with ShadowKVCache.for_model(model, config) as cache:
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, past_key_values=cache)
    assert torch.equal(tokens, expected)
    assert cache.statistics().energy_kept[0][0] > 0.999 and cache.memory().device["factors"] > 0


class IntegerLinear(torch.nn.Module):
    """A layer that keeps no floating-point tensor, as those of quantised models."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("packed", weight.detach().contiguous().view(torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.packed.view(torch.float32).T


def test_quantised_attention_layers() -> None:
    model = tiny_model("llama")
    ids, _ = padded_batch()
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, IntegerLinear(getattr(layer.self_attn, name).weight))
    config = ShadowKVConfig(rank_energy=1.0, budget_tokens=1000, dense_threshold=0, segment_tokens=64, local_tokens=8)
    with ShadowKVCache.for_model(model, config) as cache:
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache), expected)


def teacher_forced_logits(model, ids, mask, steps, cache) -> torch.Tensor:
    """Logits of the prompt's last token and of each forced token, [1 + steps, 2, vocabulary]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = [model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]]
        for step in range(steps.shape[1]):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions = mask.sum(1, keepdim=True) - 1
            token = steps[:, step : step + 1]
            out = model(token, attention_mask=mask, position_ids=positions, past_key_values=cache)
            logits.append(out.logits[:, -1])
    return torch.stack(logits)


class _NewTokensOnly(DynamicCache):
    """Counts tokens for the model's masks and positions and passes keys and values through."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.seen += keys.shape[2] if layer_idx == 0 else 0
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen + query_length, 0


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_decoding_equals_a_dense_masked_computation(family: str, as_published: bool) -> None:
    model = tiny_model(family)
    ids, mask = padded_batch()
    steps = torch.randint(2, 128, (2, STEPS + 8), generator=torch.Generator().manual_seed(2))
    config = ShadowKVConfig(
        rank=10,
        budget_tokens=16,
        candidate_factor=1 if as_published else 2,
        query_weighted=not as_published,
        num_outlier_chunks=2,
        local_tokens=8,
        segment_tokens=64,
        dense_threshold=0,
        resident_factor=1.5,
    )
    with ShadowKVCache.for_model(model, config) as cache:
        actual = teacher_forced_logits(model, ids, mask, steps, cache)
    reference = DenseShadowKV(
        rank=10,
        budget_chunks=2,
        candidate_chunks=2 if as_published else 4,
        outliers=2,
        local=8,
        segment=64,
        weighted=not as_published,
    )
    reference.real = mask.bool()
    with reference.running(model):
        expected = teacher_forced_logits(model, ids, mask, steps, _NewTokensOnly())
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    statistics = cache.statistics()
    assert statistics.attended_fraction < 0.55 and 0 < statistics.hit_rate < 1
    assert all(len(energies) == 2 for energies in statistics.energy_kept), "no generated segment was made"
    with torch.no_grad():
        full = teacher_forced_logits(model, ids, mask, steps, DynamicCache(config=model.config))
    assert (actual - full).abs().max() > 1e-3 * full.abs().max(), "compression changed nothing: the test is blind"
