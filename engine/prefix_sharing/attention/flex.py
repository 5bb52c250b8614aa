"""FlexAttention over a prefix tree: torch's Triton kernel with a block-sparse mask."""

import functools
from typing import Any

import torch
import torch.nn.functional as F

from longshadow.engine.prefix_sharing.mask import BLOCK, prefix_mask
from longshadow.engine.prefix_sharing.tree import PrefixTree

# The kernel's matrix multiplications need that many columns.
LEAST_HEAD_DIM = 16


def why_not_flex(query: torch.Tensor, *, dropout: float) -> str | None:
    """Why FlexAttention cannot do it; None where it can."""
    if not query.is_cuda and (query.requires_grad or torch.is_grad_enabled()):
        return "FlexAttention has no gradients without a CUDA device"
    if dropout:
        return "FlexAttention has no dropout"
    if query.is_cuda and query.shape[-1] < LEAST_HEAD_DIM:
        return f"FlexAttention needs a head_dim of at least {LEAST_HEAD_DIM}, this is {query.shape[-1]}"
    return None


def attend_flex(
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
    """As `TreeAttention`; the block mask is made once per tree and window."""
    from torch.nn.attention.flex_attention import AuxRequest

    # The compiled kernel's gradients want whole blocks.
    length = -(-tree.num_tokens // BLOCK) * BLOCK
    mask = tree.remembered(
        ("flex", sliding_window), lambda: prefix_mask(tree, "flex", sliding_window=sliding_window, length=length)
    )
    group = query.shape[1] // key.shape[1]
    if group & (group - 1):
        # The kernel's groups are powers of two.
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    filling = (0, 0, 0, length - tree.num_tokens)
    output, auxiliary = _kernel(query.is_cuda)(
        *(F.pad(tensor, filling) for tensor in (query, key, value)),
        score_mod=None if softcap is None else _soft_cap(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is not None:
        # A column of logit s takes e^s of the sum of all weights, so the rest keeps sigmoid(lse - s) of it.
        kept = torch.sigmoid(auxiliary.lse - sinks.to(auxiliary.lse.dtype).view(1, -1, 1))
        output = output * kept.unsqueeze(3).to(output.dtype)
    attended: torch.Tensor = output[:, :, : tree.num_tokens]
    return attended


@functools.cache
def _soft_cap(softcap: float) -> Any:
    """One function object per cap: another one would be compiled again."""

    def cap(score: torch.Tensor, batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.cache
def _kernel(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Dynamic, since every batch has another number of nodes, and past eight compilations torch falls back to T x T.
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
