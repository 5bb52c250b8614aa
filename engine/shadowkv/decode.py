"""One decoding step: landmarks propose chunks, exact logits choose among their tokens, values follow.

Legend: H KV heads, G query heads per KV head, D head_dim, m candidate chunks, c chunk size, t selected tokens.
"""

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import torch

from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.exact import (
    AttentionParameters,
    attend_parts,
    attention_logits,
    attention_weights,
    weigh_values,
)
from longshadow.engine.shadowkv.resident import ResidentChunks
from longshadow.engine.shadowkv.segment import Segment
from longshadow.engine.shadowkv.selection import (
    chunk_tokens,
    gather_keys,
    gather_values,
    score_chunks,
    select_chunks,
    select_tokens,
)
from longshadow.engine.shadowkv.storage import ExactTokens


@dataclass(kw_only=True)
class StepCounts:
    """What decoding did, over all steps, layers and sequences: tokens per KV head, chunks of all heads."""

    attended_tokens: int = 0
    scored_tokens: int = 0
    context_tokens: int = 0
    hits: int = 0
    misses: int = 0


def attend_sparsely(
    query_HGD: torch.Tensor,
    segments: Sequence_[Segment],
    tail: ExactTokens,
    resident: ResidentChunks,
    config: ShadowKVConfig,
    parameters: AttentionParameters,
    counts: StepCounts,
) -> torch.Tensor:
    """Attention of the newest token over its history, in one softmax: [H, G, D].

    It sees sink and outlier chunks, the tail, and the tokens selected per KV head: of the `candidate_factor` x
    budget tokens in the chunks with the best landmarks, those with the largest attention weight.
    """
    exact = [(segment.exact_keys, segment.exact_values) for segment in segments if segment.exact_chunks.shape[1]]
    exact.append((tail.keys, tail.values))
    num_exact = sum(keys.shape[1] for keys, _ in exact)
    num_context = sum(segment.num_tokens for segment in segments) + tail.num_tokens
    counts.context_tokens += num_context
    counts.attended_tokens += num_exact
    counts.scored_tokens += num_exact

    available = sum(segment.num_chunks - segment.exact_chunks.shape[1] for segment in segments)
    num_selected = min(config.num_selected_chunks(num_context), available)
    if num_selected == 0:
        return attend_parts(query_HGD, exact, parameters)
    num_candidates = min(round(config.candidate_factor * num_selected), available)
    num_tokens = num_selected * config.chunk_size
    counts.attended_tokens += num_tokens
    counts.scored_tokens += num_candidates * config.chunk_size

    scores = score_chunks(query_HGD, segments, parameters.scaling, parameters.softcap)
    candidates = select_chunks(scores, num_candidates)
    num_misses = candidates.numel()
    num_slots = min(config.num_resident_chunks(num_candidates, query_HGD.device), available)
    if num_slots == 0:
        keys = gather_keys(segments, candidates)
    else:
        keys, candidates, num_misses = resident.fetch_keys(
            candidates, num_slots, lambda chunks: gather_keys(segments, chunks)
        )
    counts.misses += num_misses
    counts.hits += candidates.numel() - num_misses

    logits = [
        attention_logits(query_HGD, keys, parameters) for keys in (keys.flatten(1, 2), *(keys for keys, _ in exact))
    ]
    places: torch.Tensor | None = None
    if num_candidates > num_selected:
        places = select_tokens(attention_weights(logits, parameters)[0], num_tokens)
        logits[0] = logits[0].gather(2, places.unsqueeze(1).expand(-1, logits[0].shape[1], -1))
    tokens = chunk_tokens(candidates, config.chunk_size, places)
    if num_slots == 0:
        values = gather_values(segments, tokens)
    else:
        values = resident.fetch_values(places, tokens, lambda missing: gather_values(segments, missing))
    weights = attention_weights(logits, parameters)
    return weigh_values(weights, [values, *(values for _, values in exact)]).to(query_HGD.dtype)
