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
    StepSizes,
    chunk_tokens,
    gather_keys,
    gather_values,
    score_chunks,
    select_chunks,
    select_tokens,
    step_sizes,
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

    def add(self, sizes: StepSizes, *, num_context: int, num_exact: int, chunk_size: int, num_layers: int = 1) -> None:
        """Counts the tokens of one step of one sequence: `num_exact` attended exactly, out of `num_context`."""
        self.context_tokens += num_layers * num_context
        self.attended_tokens += num_layers * (num_exact + sizes.num_selected * chunk_size)
        self.scored_tokens += num_layers * (num_exact + sizes.num_candidates * chunk_size)


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
    available = sum(segment.num_chunks - segment.exact_chunks.shape[1] for segment in segments)
    sizes = step_sizes(config, num_context, available, query_HGD.device)
    counts.add(sizes, num_context=num_context, num_exact=num_exact, chunk_size=config.chunk_size)
    if sizes.num_selected == 0:
        return attend_parts(query_HGD, exact, parameters)

    scores = score_chunks(query_HGD, segments, parameters.scaling, parameters.softcap)
    candidates = select_chunks(scores, sizes.num_candidates)
    num_misses = candidates.numel()
    if sizes.num_slots == 0:
        keys = gather_keys(segments, candidates)
    else:
        keys, candidates, num_misses = resident.fetch_keys(
            candidates, sizes.num_slots, lambda chunks: gather_keys(segments, chunks)
        )
    counts.misses += num_misses
    counts.hits += candidates.numel() - num_misses

    logits = [
        attention_logits(query_HGD, keys, parameters) for keys in (keys.flatten(1, 2), *(keys for keys, _ in exact))
    ]
    places: torch.Tensor | None = None
    if sizes.num_candidates > sizes.num_selected:
        num_tokens = sizes.num_selected * config.chunk_size
        places = select_tokens(attention_weights(logits, parameters)[0], num_tokens)
        logits[0] = logits[0].gather(2, places.unsqueeze(1).expand(-1, logits[0].shape[1], -1))
    tokens = chunk_tokens(candidates, config.chunk_size, places)
    if sizes.num_slots == 0:
        values = gather_values(segments, tokens)
    else:
        values = resident.fetch_values(places, tokens, lambda missing: gather_values(segments, missing))
    weights = attention_weights(logits, parameters)
    return weigh_values(weights, [values, *(values for _, values in exact)]).to(query_HGD.dtype)
