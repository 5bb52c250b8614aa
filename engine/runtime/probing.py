"""What a model's layers cache, and which modules they belong to, found out by running it."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from longshadow.engine.runtime.shapes import LayerShape

PROBE_TOKENS = 2


def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """What each layer caches, found out by running two tokens."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    shapes = []
    for layer in cache.layers:
        held: Any = layer
        shapes.append(
            LayerShape(
                num_kv_heads=held.keys.shape[1],
                key_dim=held.keys.shape[3],
                value_dim=held.values.shape[3],
                itemsize=held.keys.itemsize,
                window=held.sliding_window if held.is_sliding else None,
            )
        )
    return shapes


def attention_modules(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """The modules that hand keys to each cache layer."""
    return {
        int(module.layer_idx): module  # type: ignore[arg-type]
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling")
    }
