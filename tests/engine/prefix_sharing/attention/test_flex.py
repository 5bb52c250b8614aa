"""FlexAttention, whose forward a CPU has, and its block mask."""

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from longshadow import PrefixTree, prefix_mask
from longshadow.engine.prefix_sharing.attention import choose_attention
from longshadow.engine.prefix_sharing.attention.chains import attend_chains
from longshadow.engine.prefix_sharing.attention.flex import attend_flex
from tests.engine.prefix_sharing.batches import groups, pad, pairs

LONG = [
    [1] * 300 + [2] * 200,
    [1] * 300 + [3] * 40,
    [1] * 300 + [3] * 40 + [4] * 260,
    [5] * 128,
]
BATCHES = {"pairs": pairs(), "groups": groups(), "blocks": LONG}


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("window", [None, 6, 200])
@pytest.mark.parametrize("filling", [0, 300])
def test_block_mask_is_the_dense_one(rows: list[list[int]], window: int | None, filling: int) -> None:
    tree = PrefixTree.from_batch(*pad(rows))
    length = tree.num_tokens + filling
    mask = prefix_mask(tree, "flex", sliding_window=window, length=length)
    assert mask.seq_lengths == (length, length)
    expected = create_block_mask(mask.mask_mod, None, None, length, length, device="cpu")
    # Every block with a visible pair is there; with a window, blocks of which all is hidden may be, too.
    assert not (expected.to_dense().bool() & ~mask.to_dense().bool()).any()
    if window is None:
        assert torch.equal(mask.to_dense(), expected.to_dense())
        assert torch.equal(mask.full_kv_num_blocks, expected.full_kv_num_blocks)
    nodes = torch.arange(tree.num_tokens)
    entries = mask.mask_mod(torch.tensor(0), torch.tensor(0), nodes[:, None], nodes[None])
    assert torch.equal(entries, prefix_mask(tree, sliding_window=window)[0, 0])


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 6}, {"softcap": 1.5}, {"sinks": True}])
def test_forward(rows: list[list[int]], options: dict[str, Any]) -> None:
    tree = PrefixTree.from_batch(*pad(rows))
    query, key, value = (torch.randn(1, heads, tree.num_tokens, 16) for heads in (6, 2, 2))
    options = options | ({"sinks": torch.randn(6)} if "sinks" in options else {})
    with torch.no_grad():
        assert choose_attention("flex", query, dropout=0.0, softcap=None, sinks=None) is attend_flex
        actual = attend_flex(query, key, value, tree, scaling=0.3, **options)
    expected = attend_chains(query, key, value, tree, scaling=0.3, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
