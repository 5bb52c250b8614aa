"""The implementations that a CPU has, against attention in each row by itself, values and gradients, in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.prefix_sharing.attention import TreeAttention
from longshadow.engine.prefix_sharing.attention.chains import attend_chains
from longshadow.engine.prefix_sharing.attention.dense import attend_dense
from longshadow.engine.prefix_sharing.expand import expand_nodes
from longshadow.engine.prefix_sharing.tree import PrefixTree
from tests.engine.prefix_sharing.batches import groups, pad, pairs

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8


def row_attention(query, key, value, window, softcap, sinks):
    """Dense causal attention of one row, [Hq, n, D], written out."""
    logits = query @ key.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 0).mT * 0.3
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    distance = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
    visible = (distance >= 0) & (distance < (window or query.shape[1] + 1))
    logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, logits.shape[1], 1)], 2)
    weights = logits.softmax(-1)[..., : query.shape[1]]
    return weights @ value.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 0)


def compare(
    attend: TreeAttention,
    rows: list[list[int]],
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> None:
    tree = PrefixTree.from_batch(*pad(rows))
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    query = leaf(1, NUM_HEADS, tree.num_tokens, HEAD_DIM)
    key, value = (leaf(1, NUM_KV_HEADS, tree.num_tokens, HEAD_DIM) for _ in range(2))
    sink_logits = leaf(NUM_HEADS) if sinks else None
    inputs = [query, key, value, *([sink_logits] if sink_logits is not None else [])]
    weight = torch.randn(*tree.node_of.shape, NUM_HEADS * HEAD_DIM, generator=generator, dtype=torch.float64)

    shared = attend(query, key, value, tree, scaling=0.3, sliding_window=window, softcap=softcap, sinks=sink_logits)
    cells = expand_nodes(shared[0].transpose(0, 1).flatten(1), tree)
    actual = torch.autograd.grad((cells * weight).sum(), inputs)
    assert (cells[~tree.is_real] == 0).all()

    loss = torch.zeros((), dtype=torch.float64)
    for row in range(len(rows)):
        path = tree.node_of[row][tree.is_real[row]]
        out = row_attention(query[0][:, path], key[0][:, path], value[0][:, path], window, softcap, sink_logits)
        out = out.transpose(0, 1).flatten(1)
        torch.testing.assert_close(cells[row][tree.is_real[row]], out, rtol=0, atol=1e-12)
        loss = loss + (out * weight[row][tree.is_real[row]]).sum()
    expected = torch.autograd.grad(loss, inputs)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([attend_chains, attend_dense]),
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=6),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, 1.5]),
    st.booleans(),
)
def test_random_trees(
    attend: TreeAttention, rows: list[list[int]], window: int | None, softcap: float | None, sinks: bool
) -> None:
    compare(attend, rows, window, softcap, sinks)


@pytest.mark.parametrize("rows", [pairs(), groups(), [[1, 2, 3]] * 3], ids=["pairs", "groups", "equal rows"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("attend", [attend_chains, attend_dense])
def test_batches_of_trainers(attend: TreeAttention, rows: list[list[int]], window: int | None) -> None:
    compare(attend, rows, window)
