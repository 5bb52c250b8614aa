"""The specification: one attention with an explicit mask over all nodes."""

import torch
import torch.nn.functional as F

from longshadow.engine.prefix_sharing.mask import prefix_mask
from longshadow.engine.prefix_sharing.tree import PrefixTree


def attend_dense(
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
    """As `TreeAttention`; time and memory grow with T squared."""
    mask = tree.remembered(("dense", sliding_window), lambda: prefix_mask(tree, "dense", sliding_window=sliding_window))
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    return attend_masked(query, key, value, mask, scaling=scaling, dropout=dropout, softcap=softcap, sinks=sinks)


def attend_masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with soft-capped logits or sinks, which `scaled_dot_product_attention` does not know.

    query [1, Hq, m, D], key and value [1, H, n, D], mask (bool) broadcast to [1, Hq, m, n], True where seen.
    """
    group = query.shape[1] // key.shape[1]
    logits = torch.matmul(query, key.repeat_interleave(group, 1).transpose(2, 3)) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(1, -1, logits.shape[2], 1)
        logits = torch.cat([logits, column], 3)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights[..., : key.shape[2]], dropout)
    return torch.matmul(weights, value.repeat_interleave(group, 1))
