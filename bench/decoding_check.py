"""Whether the steps that a benchmark of decoding times compute what they should, on a shallow model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import CacheLayerMixin

from bench.baselines.fixed_cache import SDPA
from bench.record import Check
from bench.synthetic_decoding import SegmentPool, Setting, expect_captured, filled_cache, full_step, position_of
from longshadow.engine.ops.backend import REFERENCE
from longshadow.engine.shadowkv import DecodeGraphs

LAYERS, BATCH, STEPS = 2, 2, 3


def check_steps(setting: Setting, context: int, placements: Sequence[str], tolerance: float) -> Check:
    """Captured steps against ordinary ones: of full attention with transformers' cache, of ShadowKV with references."""
    setting = replace(setting, shape=replace(setting.shape, num_layers=LAYERS))
    model = setting.model(context + STEPS)
    pairs = [_full_logits(setting, model, context)]
    for placement in placements:
        by_kernels, by_reference = (
            _shadowkv_logits(replace(setting, backend=backend), model, placement, context)
            for backend in (setting.backend, REFERENCE)
        )
        pairs.append((by_kernels, by_reference))
    errors = [
        float((result.float() - expected.float()).abs().max() / expected.float().abs().max())
        for result, expected in pairs
    ]
    # NaN is the largest of all.
    error = max(errors, key=lambda error: (math.isnan(error), error))
    return Check(
        passed=error <= tolerance,
        max_error=error if math.isfinite(error) else None,
        text=f"logits over {context:,} tokens in {LAYERS} layers, ShadowKV's captured operators against the reference "
        "operators launched one by one, full attention's captured step against transformers' own cache, "
        f"largest difference / largest logit = {error:.1e} (at most {tolerance:.0e})",
    )


def _full_logits(setting: Setting, model: LlamaForCausalLM, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A step over the benchmark's cache, and over transformers' with the same tokens."""
    step = full_step(setting, model, context, BATCH, SDPA)
    # The one before says what the step begins with.
    ids = step().argmax(-1)
    result = step()
    stock = DynamicCache()
    for index, layer in enumerate(setting.random_cache(context, BATCH).layers):
        assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
        keys, values = (part.transpose(1, 2)[:, :, :-1] for part in (layer.keys, layer.values))
        stock.update(keys, values, index)
    model.set_attn_implementation("eager")
    position = position_of(context - 1, BATCH, model.device)
    expected = model(input_ids=ids, position_ids=position, past_key_values=stock, use_cache=True).logits
    return result, expected


def _shadowkv_logits(setting: Setting, model: LlamaForCausalLM, placement: str, context: int) -> torch.Tensor:
    """Some steps with given tokens, by graphs unless the references run, which no graph can hold."""
    config = setting.config(placement, context)
    pool = SegmentPool(setting, config, context)
    tokens = torch.arange(STEPS * BATCH, device=model.device).view(STEPS, BATCH, 1)
    found = []
    with filled_cache(setting, model, config, pool, context, BATCH) as cache:
        graphs = DecodeGraphs(model, cache)
        for number, ids in enumerate(tokens):
            position = position_of(context + number, BATCH, model.device)
            if setting.backend == REFERENCE:
                logits = model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True).logits
            else:
                logits = graphs.step(ids, position)
                expect_captured(graphs, model)
            found.append(logits.clone())
    return torch.stack(found)
