"""The layout of variable-length attention, with the kernel's arithmetic written out; and what it refuses."""

from typing import Any

import pytest
import torch

from longshadow.engine.prefix_sharing.attention import choose_attention, varlen
from longshadow.engine.prefix_sharing.attention.chains import attend_chains
from longshadow.engine.prefix_sharing.tree import PrefixTree
from tests.engine.prefix_sharing.batches import groups, pad, pairs

DEEP = [[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 7, 8, 9, 10], [1, 2, 7, 8, 11], [12, 13]]


def separate_sequences(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: varlen.VarlenLayout,
    scaling: float,
    dropout: float,
    window: tuple[int, int],
    softcap: float | None,
) -> torch.Tensor:
    """What flash attention documents: causal and windowed from the last query and the last key of each sequence."""
    outputs = []
    group = query.shape[1] // key.shape[1]
    for index in range(len(layout.cu_queries) - 1):
        queries = query[layout.cu_queries[index] : layout.cu_queries[index + 1]]
        keys, values = (
            tensor[layout.cu_keys[index] : layout.cu_keys[index + 1]].repeat_interleave(group, 1)
            for tensor in (key, value)
        )
        assert len(queries) <= layout.max_queries and len(keys) <= layout.max_keys
        logits = torch.einsum("qhd,khd->hqk", queries, keys) * scaling
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        at = torch.arange(len(queries))[:, None] + len(keys) - len(queries)
        distance = at - torch.arange(len(keys))
        visible = (distance >= 0) & ((distance <= window[0]) | (window[0] < 0))
        outputs.append(torch.einsum("hqk,khd->qhd", logits.masked_fill(~visible, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


@pytest.mark.parametrize("rows", [pairs(), groups(), DEEP], ids=["pairs", "groups", "a deeper tree"])
@pytest.mark.parametrize("window", [None, 2, 6])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_layout(monkeypatch: Any, rows: list[list[int]], window: int | None, softcap: float | None) -> None:
    monkeypatch.setattr(varlen, "_kernel", lambda: separate_sequences)
    tree = PrefixTree.from_batch(*pad(rows))
    query, key, value = (torch.randn(1, heads, tree.num_tokens, 8, dtype=torch.float64) for heads in (4, 2, 2))
    options: dict[str, Any] = dict(scaling=0.3, sliding_window=window, softcap=softcap)
    actual = varlen.attend_varlen(query, key, value, tree, **options)
    torch.testing.assert_close(actual, attend_chains(query, key, value, tree, **options), rtol=0, atol=1e-12)


def test_a_pair_copies_its_prompt_twice() -> None:
    tree = PrefixTree.from_batch(*pad([[5] * 20 + [6] * 3, [5] * 20 + [7] * 4]))
    layout = varlen.VarlenLayout.of(tree, None)
    assert len(layout.key_index) == 2 * 20 + 3 + 4
    assert layout is not varlen.VarlenLayout.of(tree, None)
    assert tree.remembered("layout", lambda: layout) is tree.remembered("layout", lambda: None)


@pytest.mark.parametrize("name", ["varlen", "flex"])
def test_what_needs_a_gpu_says_so(name: str) -> None:
    query = torch.zeros(1, 2, 3, 8, requires_grad=True)
    with pytest.raises(ValueError, match=f"attention='{name}' cannot run here: .* CUDA device"):
        choose_attention(name, query, dropout=0.0, softcap=None, sinks=None)
    assert choose_attention("auto", query, dropout=0.0, softcap=None, sinks=None) is attend_chains
    with torch.no_grad():
        assert choose_attention("auto", query, dropout=0.0, softcap=None, sinks=None) is attend_chains


def test_reasons_of_the_kernel() -> None:
    def reason(query: torch.Tensor, **given: Any) -> str | None:
        return varlen.why_not_varlen(query, **(dict(dropout=0.0, softcap=None, sinks=None) | given))

    class OnCuda:
        """As much of a CUDA tensor as the question needs."""

        is_cuda = True

        def __init__(self, dtype: torch.dtype, head_dim: int) -> None:
            self.dtype, self.shape = dtype, (1, 2, 3, head_dim)

    half: Any = OnCuda(torch.bfloat16, 64)
    single: Any = OnCuda(torch.float32, 64)
    odd: Any = OnCuda(torch.bfloat16, 36)
    assert reason(half) is None
    assert "float32" in str(reason(single)) and "36" in str(reason(odd))
    assert "sinks" in str(reason(half, sinks=torch.zeros(2)))
