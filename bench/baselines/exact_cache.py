"""A transformers cache with exact keys and values in which a selection decides what each decoded token sees.

It stands for methods that differ only in which tokens they attend to. Batch 1, nothing is made fast: attention
is dense and masked. The hand-off from `update` to the attention function rides on the keys.

Legend: Hq query heads, H KV heads, G = Hq / H, T new tokens, n tokens so far, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.masking_utils import flash_attention_mask

IMPLEMENTATION = "longshadow_bench_exact"
RECENT_QUERIES = 32
HEADROOM = 512
_LAYER = "_longshadow_bench_layer"


class Selection(Protocol):
    """Which tokens the queries of one layer attend to.

    `evicts`: what is not selected is gone, so the tokens of a later prompt do not see it either. The others
    let a prompt's tokens see everything.
    """

    evicts: bool

    def select(self, query_HGTD: torch.Tensor, keys_HnD: torch.Tensor, visible_Tn: torch.Tensor) -> torch.Tensor:
        """The tokens to attend to, [H, T, n] (bool), among the causally visible ones; queries are the last T."""


SelectionMaker = Callable[["ExactLayer"], Selection]


class ExactLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, and of its queries (times the scaling) what some methods need.

    The latest ones vote in SnapKV; the sums of squares [H, D] of all weight ShadowKV's basis.
    """

    keys: torch.Tensor
    values: torch.Tensor
    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_tokens = 0
        self.num_attended = 0
        self.num_context = 0
        self.teacher_forced = False
        self.selection: Selection | None = None
        self.recent_queries_HGWD: torch.Tensor | None = None
        self.query_energy_HD: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Empty buffers in the shape, dtype and device of the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new tokens [1, H, T, D] and returns only these, the keys carrying this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.num_tokens + key_states.shape[2]
        if stop > self.keys.shape[2]:
            self.keys = _grow(self.keys, self.num_tokens, stop + HEADROOM)
            self.values = _grow(self.values, self.num_tokens, stop + HEADROOM)
        self.keys[:, :, self.num_tokens : stop] = key_states
        self.values[:, :, self.num_tokens : stop] = value_states
        self.num_tokens = stop
        marked = key_states.view_as(key_states)
        setattr(marked, _LAYER, self)
        return marked, value_states

    def attend(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of the newest T tokens, query [1, Hq, T, D] -> [1, Hq, T, D]."""
        keys, values = self.keys[:, :, : self.num_tokens], self.values[:, :, : self.num_tokens]
        num_new = query.shape[2]
        query_HGTD = query[0].unflatten(0, (keys.shape[1], -1))
        self._remember(query_HGTD * scaling)
        decoding = num_new == 1 or self.teacher_forced
        if num_new == self.num_tokens:
            return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling, enable_gqa=True)
        position = torch.arange(self.num_tokens - num_new, self.num_tokens, device=query.device)
        visible_Tn = torch.arange(self.num_tokens, device=query.device) <= position.unsqueeze(1)
        mask_HTn = visible_Tn.expand(keys.shape[1], -1, -1)
        if self.selection is not None and (decoding or self.selection.evicts):
            mask_HTn = self.selection.select(query_HGTD * scaling, keys[0], visible_Tn) & visible_Tn
        if decoding:
            self.num_attended += int(mask_HTn.sum())
            self.num_context += int(visible_Tn.sum()) * keys.shape[1]
        return attend_masked(query_HGTD, keys[0], values[0], mask_HTn, scaling).flatten(0, 1).unsqueeze(0)

    def _remember(self, query_HGTD: torch.Tensor) -> None:
        recent = [query_HGTD[:, :, -RECENT_QUERIES:]]
        if self.recent_queries_HGWD is not None:
            recent.insert(0, self.recent_queries_HGWD)
        self.recent_queries_HGWD = torch.cat(recent, 2)[:, :, -RECENT_QUERIES:].clone()
        energy = query_HGTD.square().sum((1, 2))
        self.query_energy_HD = energy if self.query_energy_HD is None else self.query_energy_HD + energy

    def fork(self) -> ExactLayer:
        """A layer with the same tokens that goes on independently."""
        copy = ExactLayer()
        copy.lazy_initialization(self.keys, self.values)
        copy.keys = _grow(self.keys, self.num_tokens, self.num_tokens + HEADROOM)
        copy.values = _grow(self.values, self.num_tokens, self.num_tokens + HEADROOM)
        copy.num_tokens, copy.recent_queries_HGWD = self.num_tokens, self.recent_queries_HGWD
        copy.query_energy_HD = self.query_energy_HD
        return copy

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys a mask would cover."""
        return self.num_tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1


def _grow(buffer: torch.Tensor, num_used: int, capacity: int) -> torch.Tensor:
    grown = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
    grown[:, :, :num_used] = buffer[:, :, :num_used]
    return grown


def attend_masked(
    query_HGTD: torch.Tensor,
    keys_HnD: torch.Tensor,
    values_HnD: torch.Tensor,
    mask_HTn: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """softmax over the masked-in keys of scaling * query . key, times values: [H, G, T, D]."""
    logits = torch.matmul(query_HGTD, keys_HnD.transpose(1, 2).unsqueeze(1)).mul_(scaling)
    logits.masked_fill_(~mask_HTn.unsqueeze(1), -torch.inf)
    return torch.matmul(logits.softmax(-1), values_HnD.unsqueeze(1))


class ExactCache(Cache):
    """An exact cache; without a selection it is full attention."""

    layers: list[ExactLayer]  # type: ignore[assignment]

    def __init__(self, layers: list[ExactLayer]) -> None:
        super().__init__(layers=[*layers])

    @classmethod
    def empty(cls, model: PreTrainedModel) -> ExactCache:
        """A cache for `model` without tokens."""
        return cls([ExactLayer() for _ in range(model.config.num_hidden_layers)])

    def fork(self, make_selection: SelectionMaker | None = None, *, teacher_forced: bool = False) -> ExactCache:
        """A cache with the same tokens that goes on under a selection of its own.

        `teacher_forced`: blocks of several tokens are decoded tokens given in advance, so each selects for itself;
        otherwise they are prompts.
        """
        layers = [layer.fork() for layer in self.layers]
        for layer in layers:
            layer.selection = make_selection(layer) if make_selection else None
            layer.teacher_forced = teacher_forced
        return ExactCache(layers)

    @property
    def attended_fraction(self) -> float:
        """Attended tokens over visible tokens, mean over layers, KV heads and decoded tokens."""
        num_context = sum(layer.num_context for layer in self.layers)
        return sum(layer.num_attended for layer in self.layers) / num_context if num_context else 1.0

    @property
    def query_energies(self) -> list[torch.Tensor]:
        """Of each layer [1, H, D], as `ShadowKVCache.from_exact` takes them."""
        return [layer.query_energy_HD.unsqueeze(0) for layer in self.layers if layer.query_energy_HD is not None]

    def to_dynamic(self) -> DynamicCache:
        """The same tokens in transformers' own cache; shares memory with this one."""
        cache = DynamicCache()
        for index, layer in enumerate(self.layers):
            keys, values = layer.keys[:, :, : layer.num_tokens], layer.values[:, :, : layer.num_tokens]
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
    layer: ExactLayer | None = getattr(key, _LAYER, None)
    if layer is None or attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} lost the cache layer, or the batch is padded")
    out = layer.attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, flash_attention_mask)


@contextmanager
def exact_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within, `model` runs the attention that an `ExactCache` needs."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
