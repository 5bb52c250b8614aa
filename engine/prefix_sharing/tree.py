"""The prefix tree of a batch: every distinct token once, in an order in which subtrees are contiguous.

Legend: N rows, L columns, T tokens of the tree (nodes).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch

Made = TypeVar("Made")
# What tells a token's position in a padded row.
Positions = Literal["tokens", "column", "either"]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Consecutive nodes that follow one another on one path: what a row adds to the rows before it.

    Attributes:
        start, stop: the nodes, in tree order.
        depth: tokens before the first one on its path.
        ancestors: (start, stop) spans of nodes that make the path from the root to it, root first.
    """

    start: int
    stop: int
    depth: int
    ancestors: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class PrefixTree:
    """Rows that begin alike share nodes; two tokens are one node when all tokens up to them are equal.

    Nodes are numbered in depth-first order, so node k is an ancestor of node q, or q itself, exactly when
    k <= q < subtree_end[k] (arXiv 2410.20305's mask for pairs, for any tree).

    Attributes:
        token_ids: [T].
        positions: [T], tokens before the node on its path, or columns of the batch.
        subtree_end: [T], one past the last node below.
        node_of: [N, L], the node of each cell; 0 where there is padding.
        is_real: [N, L] (bool), False for padding.
        chains: a partition of the nodes, in order.
        padded_left: some row does not begin in the first column.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    subtree_end: torch.Tensor
    node_of: torch.Tensor
    is_real: torch.Tensor
    chains: tuple[Chain, ...]
    padded_left: bool
    _remembered: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_batch(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        positions: Positions = "tokens",
    ) -> Self:
        """The tree of a padded batch, input_ids and attention_mask [N, L]; padding may be on either side.

        A node's position is the number of "tokens" before it, or its "column", so that only rows that begin in the
        same one share; "either" means the column where one row is alone, and any that keep the distances otherwise.

        Raises ValueError where the shapes differ, a row has no token, or a row's tokens are not contiguous.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids and attention_mask must be [rows, columns] alike, got {list(input_ids.shape)} "
                f"and {list(attention_mask.shape)}"
            )
        ids, real = input_ids.cpu().numpy(), attention_mask.cpu().numpy().astype(bool)
        num_rows, num_columns = ids.shape
        lengths = real.sum(1)
        firsts = real.argmax(1)
        if not lengths.all():
            raise ValueError(f"row {int(lengths.argmin())} of the batch has no token")
        columns = np.arange(num_columns)
        if (real != ((columns >= firsts[:, None]) & (columns < (firsts + lengths)[:, None]))).any():
            raise ValueError("the attention mask has holes: padding must be before or after a row's tokens")
        rows = [ids[row, firsts[row] : firsts[row] + lengths[row]] for row in range(num_rows)]

        # Sorted rows that share a prefix are neighbours, so each shares most with the one before it.
        begins = np.zeros_like(firsts) if positions == "tokens" else firsts
        apart = begins if positions == "column" else np.zeros_like(firsts)
        order = sorted(range(num_rows), key=lambda row: (apart[row], rows[row].astype(">u8").tobytes()))
        path = np.zeros(0, dtype=np.int64)
        spans: list[tuple[int, int]] = []
        tokens, places, ends, chains = [], [], np.zeros(int(lengths.sum()), dtype=np.int64), []
        node_of = np.zeros((num_rows, num_columns), dtype=np.int64)
        num_nodes = 0
        previous, part, begin = rows[order[0]][:0], apart[order[0]], 0
        for row in order:
            shared = _common_length(previous, rows[row]) if apart[row] == part else 0
            begin = begin if shared else begins[row]
            ends[path[shared:]] = num_nodes
            spans = _cut(spans, shared)
            new = len(rows[row]) - shared
            if new:
                chains.append(Chain(start=num_nodes, stop=num_nodes + new, depth=shared, ancestors=tuple(spans)))
                spans.append((num_nodes, num_nodes + new))
                tokens.append(rows[row][shared:])
                places.append(begin + np.arange(shared, shared + new))
            path = np.concatenate([path[:shared], np.arange(num_nodes, num_nodes + new)])
            num_nodes += new
            node_of[row, firsts[row] : firsts[row] + lengths[row]] = path
            previous, part = rows[row], apart[row]
        ends[path] = num_nodes

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(input_ids.device)

        return cls(
            token_ids=on_device(np.concatenate(tokens)),
            positions=on_device(np.concatenate(places)),
            subtree_end=on_device(ends[:num_nodes]),
            node_of=on_device(node_of),
            is_real=on_device(real),
            chains=tuple(chains),
            padded_left=bool(firsts.any()),
        )

    def remembered(self, key: Any, make: Callable[[], Made]) -> Made:
        """What `make` gave for `key` the first time: masks and layouts are made once for all layers and passes."""
        if key not in self._remembered:
            self._remembered[key] = make()
        made: Made = self._remembered[key]
        return made

    @property
    def num_tokens(self) -> int:
        """Distinct tokens, T."""
        return len(self.token_ids)

    @functools.cached_property
    def num_real_tokens(self) -> int:
        """Cells of the padded batch that are no padding."""
        return int(self.is_real.sum())

    @property
    def token_ratio(self) -> float:
        """Cells of the padded batch per distinct token: how much less a backbone has to compute."""
        return self.node_of.numel() / self.num_tokens


_latest: tuple[torch.Tensor, torch.Tensor, Positions, PrefixTree] | None = None


def tree_of_batch(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, *, positions: Positions = "tokens"
) -> PrefixTree:
    """`PrefixTree.from_batch`, or the tree of the latest batch if this is it again, as for policy and reference."""
    global _latest
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if _latest is not None:
        ids, real, counted, tree = _latest
        same = ids.device == input_ids.device and counted == positions
        if same and torch.equal(ids, input_ids) and torch.equal(real, mask):
            return tree
    tree = PrefixTree.from_batch(input_ids, mask, positions=positions)
    # Copies: a batch may be changed in place.
    _latest = (input_ids.clone(), mask.clone(), positions, tree)
    return tree


def forget_batch() -> None:
    """Lets go of the latest tree, and of the masks that were made for it."""
    global _latest
    _latest = None


def _common_length(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the longest common prefix."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length


def _cut(spans: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The first `length` nodes of a path given as spans."""
    kept = []
    for start, stop in spans:
        if length <= 0:
            break
        kept.append((start, min(stop, start + length)))
        length -= stop - start
    return kept
