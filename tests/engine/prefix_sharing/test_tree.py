"""Prefix trees of random batches against a dictionary of prefixes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from longshadow import PrefixTree, prefix_mask
from tests.engine.prefix_sharing.batches import pad, pairs

# Few different tokens, so that prefixes meet, among them 0, the padding.
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=7)


def paths(tree: PrefixTree) -> list[list[int]]:
    """The nodes of each row."""
    return [tree.node_of[row][tree.is_real[row]].tolist() for row in range(len(tree.node_of))]


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from(["left", "right"]), st.integers(0, 2))
def test_nodes_are_the_distinct_prefixes(rows: list[list[int]], side: str, extra: int) -> None:
    tree = PrefixTree.from_batch(*pad(rows, side=side, extra=extra))
    prefixes = {tuple(row[: length + 1]) for row in rows for length in range(len(row))}
    assert tree.num_tokens == len(prefixes)
    node_of_prefix: dict[tuple[int, ...], int] = {}
    for row, path in zip(rows, paths(tree), strict=True):
        assert tree.token_ids[path].tolist() == row
        assert tree.positions[path].tolist() == list(range(len(row)))
        for depth, node in enumerate(path):
            assert node_of_prefix.setdefault(tuple(row[: depth + 1]), node) == node
    assert sorted(node_of_prefix.values()) == list(range(tree.num_tokens))
    assert tree.token_ratio == len(rows) * (max(map(len, rows)) + extra) / len(prefixes)

    mask = prefix_mask(tree)[0, 0]
    for prefix, query in node_of_prefix.items():
        seen = {node_of_prefix[prefix[: length + 1]] for length in range(len(prefix))}
        assert set(mask[query].nonzero().flatten().tolist()) == seen


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_chains_partition_the_nodes_below_their_ancestors(rows: list[list[int]]) -> None:
    tree = PrefixTree.from_batch(*pad(rows))
    mask = prefix_mask(tree)[0, 0]
    nodes = []
    for chain in tree.chains:
        nodes += range(chain.start, chain.stop)
        path = [node for start, stop in chain.ancestors for node in range(start, stop)]
        assert len(path) == chain.depth == tree.positions[chain.start]
        for query in range(chain.start, chain.stop):
            assert [*path, *range(chain.start, query + 1)] == mask[query].nonzero().flatten().tolist()
    assert nodes == list(range(tree.num_tokens))


def test_a_window_is_one_of_positions() -> None:
    tree = PrefixTree.from_batch(*pad([[1, 2, 3, 4], [1, 2, 5, 6]]))
    mask = prefix_mask(tree, sliding_window=2)[0, 0]
    first, second = paths(tree)
    for path in (first, second):
        for depth, query in enumerate(path):
            assert mask[query].nonzero().flatten().tolist() == path[max(0, depth - 1) : depth + 1]


def test_flex_attention_takes_the_block_mask() -> None:
    tree = PrefixTree.from_batch(*pad(pairs()))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, tree.num_tokens, 16, generator=generator) for _ in range(3))
    for window in (None, 7):
        dense = prefix_mask(tree, sliding_window=window)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
        actual = flex_attention(query, key, value, block_mask=prefix_mask(tree, "flex", sliding_window=window))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1], [0, 0, 0]], "row 1 of the batch has no token"),
        ([[1, 0, 1], [1, 1, 1]], "holes"),
        ([[1, 1]], "alike"),
    ],
)
def test_masks_that_are_not_padding_are_refused(mask: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixTree.from_batch(torch.ones(2, 3, dtype=torch.long), torch.tensor(mask))


def test_mask_arguments_out_of_range_are_refused() -> None:
    tree = PrefixTree.from_batch(*pad([[1, 2]]))
    with pytest.raises(ValueError, match="'dense' or 'flex'"):
        prefix_mask(tree, "sparse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        prefix_mask(tree, sliding_window=0)
