"""The attention mask of a prefix tree, for any attention that takes one."""

from typing import Any, Literal

import torch

from longshadow.engine.prefix_sharing.tree import PrefixTree


def prefix_mask(
    tree: PrefixTree, backend: Literal["dense", "flex"] = "dense", *, sliding_window: int | None = None
) -> Any:
    """Which of the tree's tokens see which: node q sees its ancestors and itself.

    With `sliding_window` w only those fewer than w positions above, as in the row the path belongs to.

    Args:
        backend: "dense" gives a bool tensor [1, 1, T, T], True where attention is allowed (as `attn_mask` of
            `scaled_dot_product_attention`); "flex" a `BlockMask` for `flex_attention` (torch's compiled one needs
            a GPU for gradients).

    Raises ValueError for another backend or a window below 1.
    """
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
    positions, subtree_end = tree.positions, tree.subtree_end

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        allowed = (key <= query) & (query < subtree_end[key])
        if sliding_window is not None:
            allowed = allowed & (positions[query] - positions[key] < sliding_window)
        return allowed

    if backend == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(
            sees, B=None, H=None, Q_LEN=tree.num_tokens, KV_LEN=tree.num_tokens, device=str(positions.device)
        )
    if backend != "dense":
        raise ValueError(f"backend must be 'dense' or 'flex', got {backend!r}")
    node = torch.arange(tree.num_tokens, device=positions.device)
    return sees(node, node, node.unsqueeze(1), node.unsqueeze(0))[None, None]
