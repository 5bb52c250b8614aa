"""A full cache in preallocated buffers: new tokens are written in place, decoding is matmul, softmax, matmul.

The fastest plain full cache there is in PyTorch on a CPU; transformers' DynamicCache copies itself every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.masking_utils import flash_attention_mask

from longshadow.engine.shadowkv.selection import dot

IMPLEMENTATION = "longshadow_bench_grouped"


class PreallocatedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values [1, H, capacity, D] of one layer."""

    keys: torch.Tensor
    values: torch.Tensor
    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._capacity = capacity
        self._num_tokens = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The buffers, in the shape, dtype and device of the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], self._capacity, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], self._capacity, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new tokens and returns views of all. Raises ValueError when they do not fit."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self._num_tokens + key_states.shape[2]
        if stop > self._capacity:
            raise ValueError(f"{stop} tokens do not fit a cache of {self._capacity}")
        self.keys[:, :, self._num_tokens : stop] = key_states
        self.values[:, :, self._num_tokens : stop] = value_states
        self._num_tokens = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys a mask would cover."""
        return self._num_tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._num_tokens

    def get_max_length(self) -> int:
        """The capacity."""
        return self._capacity


def stored_tokens(cache: Cache) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer of a full cache."""
    for layer in cache.layers:
        assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
        yield layer.keys, layer.values


def preallocated_cache(model: PreTrainedModel, capacity: int, tokens: DynamicCache | None = None) -> Cache:
    """A cache for `capacity` tokens, filled with a copy of `tokens`. It needs `IMPLEMENTATION` as attention."""
    cache = Cache(layers=[PreallocatedLayer(capacity) for _ in range(model.config.num_hidden_layers)])
    for index, (keys, values) in enumerate(stored_tokens(tokens) if tokens is not None else ()):
        cache.update(keys, values, index)
    return cache


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is not None:
        raise RuntimeError("the preallocated cache of the benchmarks takes no padding")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] == 1:
        grouped = query[0].view(key.shape[1], -1, query.shape[3])
        logits = dot(grouped * scaling, key[0])
        out = torch.bmm(logits.softmax(-1), value[0]).view(1, 1, query.shape[1], -1)
        return out, None
    if query.shape[2] != key.shape[2]:
        raise RuntimeError("the preallocated cache of the benchmarks takes one prompt, then single tokens")
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, flash_attention_mask)
