"""Nodes back to cells, and gradients back to nodes."""

import torch

from longshadow.engine.prefix_sharing.expand import expand_cells, expand_nodes
from longshadow.engine.prefix_sharing.tree import PrefixTree
from tests.engine.prefix_sharing.batches import pad, pairs


def test_gradients_of_half_precision_are_summed_in_single() -> None:
    """300 equal rows: bf16 sums would stop growing at 256."""
    tree = PrefixTree.from_batch(torch.ones(300, 2, dtype=torch.long))
    nodes = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    expand_nodes(nodes, tree).sum().backward()
    assert torch.equal(nodes.grad, torch.full_like(nodes, 300))


def test_chosen_cells_are_those_of_the_whole_expansion() -> None:
    tree = PrefixTree.from_batch(*pad(pairs(), side="left", extra=2))
    cells = torch.rand(tree.node_of.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    nodes = torch.randn(tree.num_tokens, 5, requires_grad=True)
    chosen, whole = expand_cells(nodes, tree, cells), expand_nodes(nodes, tree)[cells]
    assert torch.equal(chosen, whole) and not tree.is_real[cells].all()
    weight = torch.randn(chosen.shape)
    mine, theirs = (torch.autograd.grad((part * weight).sum(), nodes)[0] for part in (chosen, whole))
    torch.testing.assert_close(mine, theirs)
