"""Exact attention paths against a dense softmax in fp64."""

import pytest
import torch

from longshadow.engine.shadowkv import exact
from longshadow.engine.shadowkv.exact import AttentionParameters, attend_causal, attend_parts, attend_streamed


def dense(query, keys, values, parameters, visible):
    """query [Hq, T, D], keys [H, n, D], visible [T, n] -> [Hq, T, D] in fp64."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group, 0) for x in (keys, values))
    logits = query.double() @ keys.mT * parameters.scaling
    if parameters.softcap is not None:
        logits = parameters.softcap * torch.tanh(logits / parameters.softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    if parameters.sinks is not None:
        sinks = parameters.sinks.double()[:, None, None].expand(-1, logits.shape[1], 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1] @ values
    return logits.softmax(-1) @ values


def inputs(num_queries: int, num_keys: int):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, num_queries, 16, generator=generator) * 3
    return (
        query,
        torch.randn(2, num_keys, 16, generator=generator),
        torch.randn(2, num_keys, 8, generator=generator),
    )


PARAMETERS = {
    "plain": AttentionParameters(scaling=0.25),
    "softcap": AttentionParameters(scaling=0.25, softcap=2.0),
    "sinks": AttentionParameters(scaling=0.25, sinks=torch.linspace(-1, 3, 6)),
}


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 63), (7, 7), (63, 63), (5, 100)])
@pytest.mark.parametrize("window", [None, 9])
def test_causal(kind: str, num_queries: int, num_keys: int, window: int | None, monkeypatch) -> None:
    monkeypatch.setattr(exact, "LOGITS_BLOCK", 1024)  # several tiles of queries
    query, keys, values = inputs(num_queries, num_keys)
    position = torch.arange(num_keys - num_queries, num_keys).unsqueeze(1)
    visible = (torch.arange(num_keys) <= position) & (torch.arange(num_keys) > position - (window or 1000))
    expected = dense(query, keys, values, PARAMETERS[kind], visible)
    actual = attend_causal(query, keys, values, PARAMETERS[kind], sliding_window=window)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", PARAMETERS)
def test_streamed_history_equals_one_piece(kind: str) -> None:
    query, keys, values = inputs(5, 100)
    visible = torch.arange(100) <= torch.arange(95, 100).unsqueeze(1)
    history = [(keys[:, a:b], values[:, a:b]) for a, b in ((0, 40), (40, 41), (41, 90))]
    actual = attend_streamed(query, history, (keys[:, 90:], values[:, 90:]), PARAMETERS[kind])
    expected = dense(query, keys, values, PARAMETERS[kind], visible)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PARAMETERS)
def test_parts_equal_their_union(kind: str, dtype: torch.dtype) -> None:
    query, keys, values = (x.to(dtype) for x in inputs(1, 50))
    parts = [(keys[:, a:b], values[:, a:b]) for a, b in ((0, 8), (8, 8), (8, 33), (33, 50))]
    actual = attend_parts(query.view(2, 3, 16), parts, PARAMETERS[kind]).flatten(0, 1)
    expected = dense(query, keys, values, PARAMETERS[kind], torch.ones(1, 50, dtype=torch.bool))[:, 0]
    torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps * 2, atol=2e-6)
