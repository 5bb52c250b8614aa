"""The attention mask of a prefix tree, for any attention that takes one."""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from longshadow.engine.prefix_sharing.tree import PrefixTree

# The grain of FlexAttention's block-sparse masks.
BLOCK = 128


def prefix_mask(
    tree: PrefixTree,
    backend: Literal["dense", "flex"] = "dense",
    *,
    sliding_window: int | None = None,
    length: int | None = None,
) -> Any:
    """Which of the tree's tokens see which: node q sees its ancestors and itself.

    With `sliding_window` w only those fewer than w positions above, as in the row the path belongs to.

    Args:
        backend: "dense" gives a bool tensor [1, 1, T, T], True where attention is allowed (as `attn_mask` of
            `scaled_dot_product_attention`); "flex" a `BlockMask` for `flex_attention`, found block by block from
            the tree without a T x T intermediate (`flex_attention` needs a GPU for gradients).
        length: of the block mask, T by default; a longer one is for tokens that fill up the sequence.

    Raises ValueError for another backend, a window below 1 or a length below T.
    """
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
    if backend == "flex":
        return _block_mask(tree, sliding_window, tree.num_tokens if length is None else length)
    if backend != "dense":
        raise ValueError(f"backend must be 'dense' or 'flex', got {backend!r}")
    node = torch.arange(tree.num_tokens, device=tree.positions.device)
    query, key = node.unsqueeze(1), node.unsqueeze(0)
    allowed = (key <= query) & (query < tree.subtree_end[key])
    if sliding_window is not None:
        allowed = allowed & (tree.positions[query] - tree.positions[key] < sliding_window)
    return allowed[None, None]


def _block_mask(tree: PrefixTree, sliding_window: int | None, length: int) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    filling = length - tree.num_tokens
    if filling < 0:
        raise ValueError(f"length must be at least the tree's {tree.num_tokens} tokens, got {length}")
    positions = F.pad(tree.positions, (0, filling))
    # Filling is its own subtree, so that no softmax is over nothing.
    filled = torch.arange(tree.num_tokens + 1, length + 1, device=positions.device)
    subtree_end = torch.cat([tree.subtree_end, filled])

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        allowed = (key <= query) & (query < subtree_end[key])
        if sliding_window is not None:
            allowed = allowed & (positions[query] - positions[key] < sliding_window)
        return allowed

    pairs = _visible_pairs(tree, -(-length // BLOCK))
    full = pairs == BLOCK * BLOCK
    if sliding_window is not None:
        full[:] = False
    partial = (pairs > 0) & ~full
    # Filling sees itself.
    np.fill_diagonal(partial, partial.diagonal() | ~full.diagonal())

    def listed(blocks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """How many key blocks each query block has, and which, those first."""
        indices = np.argsort(~blocks, axis=1, kind="stable")
        count, index = (torch.from_numpy(part.astype(np.int32)) for part in (blocks.sum(1), indices))
        return count[None, None].to(positions.device), index[None, None].to(positions.device)

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _visible_pairs(tree: PrefixTree, num_blocks: int) -> np.ndarray:
    """[query blocks, key blocks], how many pairs of nodes see each other, windows left aside."""
    edges = np.arange(num_blocks) * BLOCK

    def overlap(start: int, stop: int) -> np.ndarray:
        length: np.ndarray = np.minimum(stop, edges + BLOCK) - np.maximum(start, edges)
        return length.clip(0)

    pairs: np.ndarray = np.zeros((num_blocks, num_blocks), dtype=np.int64)
    for chain in tree.chains:
        own = overlap(chain.start, chain.stop)
        above = np.zeros(num_blocks, dtype=np.int64)
        for span in chain.ancestors:
            above += overlap(*span)
        pairs += np.outer(own, above) + np.tril(np.outer(own, own), -1) + np.diag(own * (own + 1) // 2)
    return pairs
