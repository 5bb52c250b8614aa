"""Weights of key elements against the logit errors they stand for."""

import pytest
import torch

from longshadow.engine.shadowkv.query_weights import QueryEnergy
from longshadow.engine.shadowkv.rope import RotaryLayout, Rotation, rotate

NUM_KV_HEADS, GROUP, HEAD_DIM = 2, 3, 8


def queries(num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_KV_HEADS * GROUP, num_tokens, HEAD_DIM)
    return torch.randn(shape, generator=generator) * torch.linspace(0.2, 3, HEAD_DIM)


def key_weights(*parts: torch.Tensor, layout: RotaryLayout | None) -> torch.Tensor:
    energy = QueryEnergy()
    for part in parts:
        energy.add(part, NUM_KV_HEADS)
    weights = energy.key_weights(layout)
    assert weights is not None
    return weights


@pytest.mark.parametrize("style", ["half", "interleaved", None])
def test_weights_predict_the_mean_squared_logit_error(style: str | None) -> None:
    """Over queries, and over all rotations between query and key, for an error in any single element."""
    layout = None if style is None else RotaryLayout(style=style, rotary_dim=6)  # type: ignore[arg-type]
    query = queries(50)
    weights = key_weights(query, layout=layout)
    angles = torch.rand(2000, 3, generator=torch.Generator().manual_seed(1)) * 2 * torch.pi
    cost = torch.zeros(NUM_KV_HEADS, HEAD_DIM)
    for element in range(HEAD_DIM):
        error = torch.zeros(2000, HEAD_DIM)
        error[:, element] = 1
        if layout is not None:
            error = rotate(error, Rotation(angles.cos(), angles.sin()), layout)
        logits = query.unflatten(0, (NUM_KV_HEADS, GROUP)) @ error.T
        cost[:, element] = logits.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(weights, cost / cost.mean(), rtol=0.03, atol=0)


def test_chunks_of_a_prompt_add_up() -> None:
    query, layout = queries(50), RotaryLayout(style="half", rotary_dim=8)
    whole = key_weights(query, layout=layout)
    torch.testing.assert_close(key_weights(query[:, :17], query[:, 17:], layout=layout), whole)


def test_without_queries_all_elements_are_alike() -> None:
    assert QueryEnergy().key_weights(None) is None
    assert torch.equal(key_weights(torch.zeros(4, 3, 8), layout=None), torch.ones(2, 8))


def test_elements_without_a_query_still_weigh_something() -> None:
    query = queries(20)
    query[..., 3] = 0
    weights = key_weights(query, layout=None)
    assert 0 < float(weights.min()) < 0.01
