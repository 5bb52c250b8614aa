"""The tokens that a text model's mask shows, in any of the forms in which transformers hands masks on.

Legend: B rows, T new tokens, n tokens so far.
"""

from collections.abc import Mapping
from typing import Any

import torch

FULL_ATTENTION = "full_attention"
# Of query rows whose mask is compared at once, in elements.
BLOCK = 1 << 24


def row_mask(mask: Any, num_new: int, name: str) -> torch.Tensor | None:
    """The real tokens [B, n] (bool) of a mask [B, n], or of one that is made already; None where all are.

    A mask that is made already, as multimodal models do above their text model, is [B or 1, 1, T, n], bool or to be
    added, or a BlockMask, or a mapping of those by kind of layer. Raises ValueError for one that is not causal.
    """
    if isinstance(mask, Mapping):
        mask = mask.get(FULL_ATTENTION, next(iter(mask.values()), None))
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        mask = _dense(mask)
    if mask.dim() == 4:
        mask = _shown(mask, num_new, name)
    if mask.dim() != 2:
        raise ValueError(f"attention masks are [batch, tokens] here, got shape {list(mask.shape)}")
    mask = mask.bool()
    return None if bool(mask.all()) else mask


def check_columns(mask: Any, batch_size: int, num_cached: int, num_new: int) -> None:
    """Raises ValueError for a mask [B, n] that is not about the cached tokens and the new ones."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return
    if mask.shape[0] not in (1, batch_size) or mask.shape[1] != num_cached + num_new:
        raise ValueError(
            f"the attention mask is {list(mask.shape)}, but there are {batch_size} sequences of {num_cached} cached "
            f"and {num_new} new tokens: pass the mask of the earlier turns, unchanged, before theirs"
        )


def _dense(mask: Any) -> torch.Tensor:
    """A flex_attention BlockMask as [B, 1, T, n]."""
    from torch.nn.attention.flex_attention import create_mask

    batch, _, num_new, num_tokens = mask.shape
    dense: torch.Tensor = create_mask(mask.mask_mod, batch, 1, num_new, num_tokens, device=mask.kv_num_blocks.device)
    return dense


def _shown(mask: torch.Tensor, num_new: int, name: str) -> torch.Tensor:
    """[B, n] of a causal mask [B, 1, T, n]: what the last query sees."""
    if mask.dtype is not torch.bool:
        if not mask.is_floating_point():
            raise ValueError(f"attention masks of four dimensions are bool or floating, got {mask.dtype}")
        mask = mask == 0
    rows, _, num_queries, num_tokens = mask.shape
    shown = mask[:, 0, -1]
    causal = num_queries == num_new <= num_tokens
    if causal:
        columns = torch.arange(num_tokens, device=mask.device)
        step = max(1, BLOCK // (rows * num_tokens))
        for start in range(0, num_new, step):
            queries = columns[num_tokens - num_new :][start : start + step]
            expected = shown[:, None] & (columns <= queries[:, None])
            # What padding sees is nobody's.
            wrong = (mask[:, 0, start : start + step] != expected) & shown[:, queries, None]
            causal = causal and not bool(wrong.any())
    if not causal:
        raise ValueError(
            f"{name} was given a mask that is not causal with padding, as for images whose tokens see one another: "
            "ShadowKVCache does not support that, use the model's own cache"
        )
    return shown
