"""Attention chain by chain: no T x T mask, and no key or value is computed twice.

Each chain's queries see the spans of nodes above it and, causally, the chain itself, so a pair of answers costs one
causal attention over prompt and first answer and one small attention of the second answer over prompt and itself.

Legend: Hq query heads, H KV heads, T nodes of the tree, m queries and n keys of a chain, D head_dim.
"""

import torch
import torch.nn.functional as F

from longshadow.engine.prefix_sharing.attention.dense import attend_masked
from longshadow.engine.prefix_sharing.tree import Chain, PrefixTree


def attend_chains(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: PrefixTree,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `TreeAttention`."""
    outputs = []
    for chain in tree.chains:
        spans = visible_ancestors(chain, sliding_window)
        num_above = sum(stop - start for start, stop in spans)
        keys, values = (_take(tensor, [*spans, (chain.start, chain.stop)]) for tensor in (key, value))
        queries = query[:, :, chain.start : chain.stop]
        window = sliding_window if sliding_window is not None and sliding_window < keys.shape[2] else None
        mask = None if num_above == 0 and window is None else _mask(queries.shape[2], num_above, window, key.device)
        if softcap is None and sinks is None:
            group = queries.shape[1] // keys.shape[1]
            if group > 1 and not keys.is_cuda:
                # On a CPU torch's grouped attention is half as fast as repeated heads.
                keys, values, group = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1), 1
            output = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=group > 1,
            )
        else:
            mask = _mask(queries.shape[2], num_above, window, key.device) if mask is None else mask
            output = attend_masked(
                queries, keys, values, mask, scaling=scaling, dropout=dropout, softcap=softcap, sinks=sinks
            )
        outputs.append(output)
    return torch.cat(outputs, 2)


def visible_ancestors(chain: Chain, sliding_window: int | None) -> list[tuple[int, int]]:
    """The ancestors' spans without what even the chain's first query cannot see."""
    hidden = 0 if sliding_window is None else max(0, chain.depth - sliding_window + 1)
    spans = []
    for start, stop in chain.ancestors:
        if stop - start > hidden:
            spans.append((start + hidden, stop))
        hidden = max(0, hidden - (stop - start))
    return spans


def _take(tensor: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    parts = [tensor[:, :, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _mask(num_queries: int, num_above: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """[m, n] (bool): query i sees everything above and the chain up to itself, within the window."""
    query = torch.arange(num_above, num_above + num_queries, device=device).unsqueeze(1)
    key = torch.arange(num_above + num_queries, device=device)
    mask = key <= query
    return mask if sliding_window is None else mask & (query - key < sliding_window)
