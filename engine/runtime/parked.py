"""Attention of a prompt's later chunks to its earlier ones, which are parked: one call over a single buffer.

Legend: Hq query heads, H KV heads, T tokens of the chunk, n parked tokens, the chunk's included, D head_dim.
"""

import torch
import torch.nn.functional as F

from longshadow.engine.runtime.state import LayerSequence
from longshadow.engine.shadowkv.exact import AttentionParameters
from longshadow.engine.shadowkv.sequence import Sequence
from longshadow.engine.shadowkv.storage import ExactTokens

# Longer contexts are streamed: a mask of this many keys is still small.
LONGEST_MASKED = 16_384


def attends_parked(sequence: LayerSequence, query: torch.Tensor, parameters: AttentionParameters) -> bool:
    """Whether parked tokens are all of the history, lie where the queries [Hq, T, D] are, and SDPA computes this."""
    if not isinstance(sequence, Sequence) or sequence.parked is None or sequence.segments or sequence.tail.num_tokens:
        return False
    parked = sequence.parked
    is_near = parked.num_tokens > 0 and parked.keys.device == query.device
    is_plain = parameters.sinks is None and parameters.softcap is None
    return is_near and is_plain and parked.num_tokens + query.shape[1] <= LONGEST_MASKED


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """[T, n]: the last query sees all keys, each one before it one less."""
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return mask.tril_(num_keys - num_queries)


def attend_parked(
    query: torch.Tensor, parked: ExactTokens, mask: torch.Tensor, parameters: AttentionParameters
) -> torch.Tensor:
    """Queries [Hq, T, D] of the last parked tokens over all of them: [Hq, T, D]."""
    keys, values = parked.keys, parked.values
    return F.scaled_dot_product_attention(
        query.unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        scale=parameters.scaling,
        enable_gqa=query.shape[0] != keys.shape[0],
    ).squeeze(0)
