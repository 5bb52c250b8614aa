"""From the tree's nodes back to the rows a trainer expects.

Legend: N rows, L columns, T nodes, H hidden size.
"""

from typing import Any

import torch

from longshadow.engine.prefix_sharing.tree import PrefixTree


def expand_nodes(nodes: torch.Tensor, tree: PrefixTree, *, check_padding: bool = False) -> torch.Tensor:
    """Gives each cell of the padded batch its node's vector, zeros to padding: [T, H] -> [N, L, H].

    The gradient of a node is the sum over its cells, added in fp32 or better and rounded once. Padding has no node:
    with `check_padding`, a gradient that arrives there raises RuntimeError.
    """
    arguments = (nodes, tree.node_of, tree.is_real, check_padding)
    expanded: torch.Tensor = _Expand.apply(*arguments)  # type: ignore[no-untyped-call]
    return expanded


def expand_cells(nodes: torch.Tensor, tree: PrefixTree, cells: torch.Tensor) -> torch.Tensor:
    """As `expand_nodes` for the M chosen cells (bool [N, L]) alone, in reading order: [T, H] -> [M, H]."""
    arguments = (nodes, tree.node_of[cells], tree.is_real[cells], False)
    expanded: torch.Tensor = _Expand.apply(*arguments)  # type: ignore[no-untyped-call]
    return expanded


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, nodes: torch.Tensor, node_of: torch.Tensor, is_real: torch.Tensor, check_padding: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(node_of, is_real)
        ctx.check_padding = check_padding
        ctx.num_nodes = nodes.shape[0]
        rows = nodes.index_select(0, node_of.flatten()).view(*node_of.shape, nodes.shape[1])
        return rows.masked_fill_(~is_real.unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        node_of, is_real = ctx.saved_tensors
        if ctx.check_padding and bool(gradient[~is_real].any()):
            raise RuntimeError(
                "this loss depends on what the model computes for padding, which sharing leaves out: train without it"
            )
        summed = gradient.new_zeros(
            ctx.num_nodes, gradient.shape[-1], dtype=torch.promote_types(gradient.dtype, torch.float32)
        )
        summed.index_add_(0, node_of[is_real], gradient[is_real].to(summed.dtype))
        return summed.to(gradient.dtype), None, None, None
