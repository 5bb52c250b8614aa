"""Exact attention: over whole prompts, over a history that comes in blocks, and over parts of a cache.

Legend: B batch, Hq query heads, H KV heads, G = Hq / H, T queries, n keys, D head_dim.
"""

import copy
import functools
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from longshadow.engine.shadowkv.selection import cap_logits, dot, join

# Logits held at once by the streamed path, in elements.
LOGITS_BLOCK = 1 << 24


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionParameters:
    """What an attention layer asks for beside queries, keys and values.

    Attributes:
        scaling: factor of query . key.
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: [Hq] logits of an extra column that takes probability and gives nothing (gpt-oss).
    """

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def attend_parts(
    query_HGD: torch.Tensor,
    parts: Iterable[tuple[torch.Tensor, torch.Tensor]],
    parameters: AttentionParameters,
) -> torch.Tensor:
    """One query per head over keys and values [H, n_i, D] given in parts, without joining them: [H, G, D].

    softmax(scaling * query . key) value over the union of the parts, computed in fp32 or better.
    """
    parts = list(parts)
    logits = [attention_logits(query_HGD, keys, parameters) for keys, _ in parts]
    weights = attention_weights(logits, parameters)
    return weigh_values(weights, [values for _, values in parts]).to(query_HGD.dtype)


def attention_logits(query_HGD: torch.Tensor, keys_HnD: torch.Tensor, parameters: AttentionParameters) -> torch.Tensor:
    """scaling * query . key, soft-capped, in fp32 or better: [H, G, n]."""
    logits = dot(_at_least_fp32(query_HGD) * parameters.scaling, _at_least_fp32(keys_HnD))
    return cap_logits(logits, parameters.softcap)


def attention_weights(logits_HGn: Sequence[torch.Tensor], parameters: AttentionParameters) -> list[torch.Tensor]:
    """One softmax over parts [H, G, n_i] and the sink column, if any; as parts again, without the sink."""
    joined = join(logits_HGn)
    if parameters.sinks is not None:
        joined = torch.cat([joined, parameters.sinks.to(joined).view(*joined.shape[:2], 1)], 2)
    weights, start = joined.softmax(-1), 0
    parts = []
    for part in logits_HGn:
        parts.append(weights[:, :, start : start + part.shape[2]])
        start += part.shape[2]
    return parts


def weigh_values(weights_HGn: Sequence[torch.Tensor], values_HnD: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over the parts of weights [H, G, n_i] x values [H, n_i, D], in the weights' dtype: [H, G, D]."""
    out = weights_HGn[0].new_zeros(*weights_HGn[0].shape[:2], values_HnD[0].shape[2])
    for weights, values in zip(weights_HGn, values_HnD, strict=True):
        out.baddbmm_(weights, values.to(weights.dtype))
    return out


def attend_causal(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    parameters: AttentionParameters,
    *,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal attention of the last T tokens [Hq, T, D] over n >= T tokens [H, n, D]: [Hq, T, D].

    Query i sits at key n - T + i and sees keys up to it, of a sliding window only the last `sliding_window`.
    flash-attn where it is installed and applies, else SDPA, else the streamed computation.
    """
    num_queries, num_keys = query.shape[1], keys.shape[1]
    if sliding_window is not None and sliding_window >= num_keys:
        sliding_window = None
    if num_queries == 1 and sliding_window is None:
        grouped = query.view(keys.shape[0], -1, query.shape[2])
        return attend_parts(grouped, [(keys, values)], parameters).flatten(0, 1).unsqueeze(1)
    if parameters.sinks is None and flash_attention_applies(query):
        return _flash_attention(query, keys, values, parameters, sliding_window)
    plain = parameters.sinks is None and parameters.softcap is None and sliding_window is None
    if plain and num_queries == num_keys:
        return F.scaled_dot_product_attention(
            query.unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            is_causal=True,
            scale=parameters.scaling,
            enable_gqa=query.shape[0] != keys.shape[0],
        ).squeeze(0)
    return attend_streamed(query, [], (keys, values), parameters, sliding_window=sliding_window)


def attend_streamed(
    query: torch.Tensor,
    history: Iterable[tuple[torch.Tensor, torch.Tensor]],
    own: tuple[torch.Tensor, torch.Tensor],
    parameters: AttentionParameters,
    *,
    sliding_window: int | None = None,
    begun: "OnlineSoftmax | None" = None,
) -> torch.Tensor:
    """Queries [Hq, T, D] over all of `history`, block by block, and causally over their own keys: [Hq, T, D].

    Each block of history and `own` are keys and values [H, n, D]; the last T of `own` belong to the queries.
    Online softmax in fp32 or better, so no more than one block of history is needed at a time. It goes on from one that
    was `begun` with the same queries.
    """
    online = begun or OnlineSoftmax(query, own[0].shape[0], own[1].shape[2], parameters)
    for keys, values in history:
        online.add(keys, values)
    online.add(*own, causal=True, sliding_window=sliding_window)
    return online.result()


class OnlineSoftmax:
    """Running softmax attention of many queries over blocks of keys (arXiv 2112.05682)."""

    def __init__(self, query: torch.Tensor, num_kv_heads: int, value_dim: int, parameters: AttentionParameters) -> None:
        """Queries [Hq, T, D] that have seen nothing."""
        self._dtype = query.dtype
        self._parameters = parameters
        self._query_HGTD = _at_least_fp32(query).unflatten(0, (num_kv_heads, -1))
        shape = self._query_HGTD.shape[:3]
        self._sum = self._query_HGTD.new_zeros(*shape, value_dim)
        if parameters.sinks is None:
            self._maximum = self._query_HGTD.new_full((*shape, 1), -torch.inf)
            self._norm = self._query_HGTD.new_zeros(*shape, 1)
        else:
            sinks = parameters.sinks.to(self._query_HGTD).view(*shape[:2], 1, 1)
            self._maximum = sinks.expand(*shape, 1).clone()
            self._norm = torch.ones_like(self._maximum)

    def add(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        causal: bool = False,
        sliding_window: int | None = None,
    ) -> None:
        """Keys and values [H, n, D], seen by all queries; or `causal`: the last T belong to the queries."""
        num_kv_heads, num_groups, num_queries, _ = self._query_HGTD.shape
        num_keys = keys.shape[1]
        keys, values = _at_least_fp32(keys), _at_least_fp32(values)
        tile = max(1, LOGITS_BLOCK // (num_kv_heads * num_groups * num_keys))
        for start in range(0, num_queries, tile):
            stop = min(start + tile, num_queries)
            first, last = 0, num_keys
            if causal:
                last = num_keys - num_queries + stop
                if sliding_window is not None:
                    first = max(0, num_keys - num_queries + start - sliding_window + 1)
            query = self._query_HGTD[:, :, start:stop].flatten(1, 2)
            logits = torch.bmm(query, keys[:, first:last].transpose(1, 2)).mul_(self._parameters.scaling)
            logits = cap_logits(logits, self._parameters.softcap).unflatten(1, (num_groups, -1))
            if causal:
                position = torch.arange(num_keys - num_queries + start, last, device=keys.device).unsqueeze(1)
                key_position = torch.arange(first, last, device=keys.device)
                hidden = key_position > position
                if sliding_window is not None:
                    hidden |= key_position <= position - sliding_window
                logits.masked_fill_(hidden, -torch.inf)
            self._merge(slice(start, stop), logits, values[:, first:last])

    def _merge(self, queries: slice, logits: torch.Tensor, values: torch.Tensor) -> None:
        old = self._maximum[:, :, queries]
        new = torch.maximum(old, logits.amax(-1, keepdim=True))
        decay = torch.exp(old - new)
        weights = torch.exp_(logits.sub_(new))
        self._norm[:, :, queries] = self._norm[:, :, queries] * decay + weights.sum(-1, keepdim=True)
        added = torch.bmm(weights.flatten(1, 2), values).unflatten(1, weights.shape[1:3])
        self._sum[:, :, queries] = self._sum[:, :, queries] * decay + added
        self._maximum[:, :, queries] = new

    def split(self, lengths: Sequence[int]) -> list["OnlineSoftmax"]:
        """The first queries, the next ones, and so on: each goes on by itself."""
        parts = [copy.copy(self) for _ in lengths]
        for name in ("_query_HGTD", "_sum", "_maximum", "_norm"):
            for part, piece in zip(parts, getattr(self, name).split(list(lengths), dim=2), strict=True):
                setattr(part, name, piece)
        return parts

    def result(self) -> torch.Tensor:
        """Attention over everything that was added, [Hq, T, D]."""
        out: torch.Tensor = (self._sum / self._norm).flatten(0, 1)
        return out.to(self._dtype)


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@functools.cache
def _flash_attention_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def flash_attention_applies(query: torch.Tensor) -> bool:
    """Whether flash-attn is installed and its kernels take these queries [.., D]."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _flash_attention_installed()
    )


def _flash_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    parameters: AttentionParameters,
    sliding_window: int | None,
) -> torch.Tensor:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    out: torch.Tensor = flash_attn_func(
        *(x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values)),
        softmax_scale=parameters.scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=parameters.softcap or 0.0,
    )
    return out.squeeze(0).transpose(0, 1)
