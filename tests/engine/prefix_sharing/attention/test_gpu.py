"""What a CPU does not have: variable-length flash attention and FlexAttention with gradients, in half precision.

Run by `make gpu-check`.
"""

from typing import Any

import pytest
import torch

from longshadow import share_prefixes
from longshadow.engine.prefix_sharing.attention import TreeAttention, choose_attention
from longshadow.engine.prefix_sharing.attention.dense import attend_dense
from longshadow.engine.prefix_sharing.attention.flex import attend_flex
from longshadow.engine.prefix_sharing.attention.varlen import attend_varlen
from longshadow.engine.prefix_sharing.tree import PrefixTree
from tests.engine.prefix_sharing.attention.test_flex import BATCHES
from tests.engine.prefix_sharing.batches import pad, pairs
from tests.engine.shadowkv.families import tiny_model


def tree_of(rows: list[list[int]]) -> PrefixTree:
    return PrefixTree.from_batch(*(tensor.cuda() for tensor in pad(rows)))


def gradients(attend: TreeAttention, tensors: list[torch.Tensor], tree: PrefixTree, **options: Any) -> Any:
    """The output, and the gradients of a fixed weighting of it."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = attend(*leaves, tree, scaling=0.1, **options)
    weight = torch.linspace(-1, 1, output.numel(), device="cuda").view(output.shape)
    return output, *torch.autograd.grad((output.float() * weight).sum(), leaves)


@pytest.mark.gpu
def test_causal_masks_end_with_the_last_query_and_key() -> None:
    """The second chain has fewer queries than keys: its first query sees the prompt and itself, not more, not less."""
    tree = tree_of([[5] * 40 + [6] * 9, [5] * 40 + [7] * 3])
    query, key, value = (torch.randn(1, 2, tree.num_tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert choose_attention("varlen", query, dropout=0.0, softcap=None, sinks=None) is attend_varlen
    actual = attend_varlen(query, key, value, tree, scaling=0.1)
    expected = attend_dense(query, key, value, tree, scaling=0.1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("window", [None, 6, 200])
@pytest.mark.parametrize("attend", [attend_varlen, attend_flex])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 2)])
def test_values_and_gradients(
    attend: TreeAttention, rows: list[list[int]], window: int | None, heads: tuple[int, int]
) -> None:
    """Errors against fp32 at most twice those of the dense specification in the same precision."""
    tree = tree_of(rows)
    exact = [torch.randn(1, count, tree.num_tokens, 64, device="cuda") for count in (heads[0], heads[1], heads[1])]
    half = [tensor.bfloat16() for tensor in exact]
    reference = gradients(attend_dense, [tensor.float() for tensor in half], tree, sliding_window=window)
    dense = gradients(attend_dense, half, tree, sliding_window=window)
    actual = gradients(attend, half, tree, sliding_window=window)
    for mine, theirs, right in zip(actual, dense, reference, strict=True):
        allowed = 2 * (theirs.float() - right).abs().max() + 1e-3 * right.abs().max()
        assert (mine.float() - right).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"sinks": True}, {"softcap": 1.5, "sliding_window": 200}])
def test_flex_with_caps_and_sinks(options: dict[str, Any]) -> None:
    tree = tree_of(BATCHES["blocks"])
    options = options | ({"sinks": torch.randn(4, device="cuda")} if "sinks" in options else {})
    tensors = [torch.randn(1, heads, tree.num_tokens, 64, device="cuda") for heads in (4, 2, 2)]
    # Matrix products of the kernel are in TF32.
    for mine, theirs in zip(
        gradients(attend_flex, tensors, tree, **options), gradients(attend_dense, tensors, tree, **options), strict=True
    ):
        assert (mine - theirs).abs().max() <= 1e-2 * theirs.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["auto", "dense", "chains", "flex", "varlen"])
def test_a_model_shares(attention: str) -> None:
    """The first batch is verified against the padded path; then a step of training runs."""
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    if attention in ("flex", "varlen") and model.config.head_dim < 16:
        pytest.skip("the kernels need wider heads")
    ids, mask = (tensor.cuda() for tensor in pad(pairs()))
    with share_prefixes(model, attention=attention) as report:
        model(ids, attention_mask=mask).logits.float().square().mean().backward()
    assert report.shared_batches == 1 and report.verified
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
def test_new_lengths_do_not_compile_forever() -> None:
    """Thirty batches of different lengths: past torch's limit of compilations it would fall back to T x T."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for length in range(30):
        tree = tree_of([[5] * (200 + 37 * length) + [6] * 9, [5] * (200 + 37 * length) + [7] * 30])
        tensors = [torch.randn(1, 2, tree.num_tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        gradients(attend_flex, tensors, tree)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
