"""What the quality tables share: the model, one exact prefill for all methods, and the check of the machinery."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from bench.baselines.exact_cache import ExactCache, exact_attention
from bench.methods import CHUNK_TOKENS, SINK_CHUNKS
from bench.record import Check
from longshadow import ShadowKVCache, ShadowKVConfig

CHECK_TOLERANCE = 1e-3


def feed(model: PreTrainedModel, cache: Cache, tokens: list[int]) -> torch.Tensor:
    """Runs `tokens` through the model as one block; the logits of the last one, [vocabulary]."""
    ids = torch.tensor([tokens], device=model.device)
    logits: torch.Tensor = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[0, -1]


def prefill(
    model: PreTrainedModel, tokens: list[int], after: ExactCache | None = None
) -> tuple[ExactCache, torch.Tensor]:
    """An exact cache of `tokens`, continuing a copy of `after`, and the logits of the last token."""
    cache = after.fork() if after is not None else ExactCache.empty(model)
    with exact_attention(model):
        return cache, feed(model, cache, tokens)


def decode_greedily(
    model: PreTrainedModel, cache: Cache, logits: torch.Tensor, *, steps: int, stop: int | None
) -> list[int]:
    """Up to `steps` most likely tokens, the first from `logits`; ends after the token `stop`."""
    tokens = [int(logits.argmax())]
    while len(tokens) < steps and tokens[-1] != stop:
        tokens.append(int(feed(model, cache, tokens[-1:]).argmax()))
    return tokens


def check_full_size(model: PreTrainedModel, tokens: list[int], next_token: int) -> Check:
    """With nothing left out, the bench's exact cache and ShadowKV must give the logits of transformers' own cache."""
    stock = DynamicCache()
    feed(model, stock, tokens)
    expected = feed(model, stock, [next_token])
    exact, _ = prefill(model, tokens)
    everything = ShadowKVConfig(
        budget_tokens=len(tokens) + CHUNK_TOKENS,
        rank=exact.layers[0].keys.shape[1] * exact.layers[0].keys.shape[3],
        num_sink_chunks=SINK_CHUNKS,
        chunk_size=CHUNK_TOKENS,
        dense_threshold=0,
    )
    with ShadowKVCache.from_exact(model, everything, exact.to_dynamic(), exact.query_energies) as shadow:
        results = [feed(model, shadow, [next_token])]
    with exact_attention(model):
        results.append(feed(model, exact, [next_token]))
    scale = float(expected.abs().max())
    error = max(float((result - expected).abs().max()) for result in results) / scale
    return Check(
        passed=error <= CHECK_TOLERANCE,
        max_error=error,
        text="logits of the bench's exact cache and of ShadowKV at full rank and budget against transformers' own "
        f"cache, largest difference / largest logit = {error:.1e} (at most {CHECK_TOLERANCE:.0e})",
    )
