"""One decoding step of several sequences, those together that share their segments: questions on one document.

Each attends to what it would attend to by itself (`decode`). Landmarks are scored for all queries in one product.
Questions on one document want many of the same chunks. Where they do, a chunk's keys are rebuilt once for all that want
it, and multiplied with all queries; what a sequence did not ask for is dropped from its logits. From there on the
sequences stand beside each other as further heads.

Legend: B sequences, H KV heads, G query heads per KV head, D head_dim, V that of values, m candidate chunks, n of all
sequences, U wanted by any, C all chunks, c chunk size, t selected tokens, T tokens of the longest tail.
"""

import math
from collections.abc import Sequence as Sequence_
from dataclasses import replace

import torch

from longshadow.engine.shadowkv.exact import AttentionParameters, attention_logits, attention_weights, weigh_values
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
from longshadow.engine.shadowkv.sequence import Sequence, rows_by_segments

# Of keys that are rebuilt at once, and of their logits, so that a step's temporary memory does not grow with the number
# of sequences.
LARGEST_PART = 64 * 2**20
# How often a chunk must be wanted on average for keys to be multiplied with all queries, most of them in vain.
LEAST_SHARED = 2


def attend_tokens(sequences: Sequence_[Sequence], query: torch.Tensor, parameters: AttentionParameters) -> torch.Tensor:
    """Sparse attention of each sequence's newest cached token, query [B, Hq, D]: [B, Hq, V]."""
    grouped = query.unflatten(1, (sequences[0].tail.keys.shape[0], -1))
    out = query.new_empty(*query.shape[:2], sequences[0].tail.values.shape[2])
    for rows in rows_by_segments(sequences):
        sizes = _common_sizes([sequences[row] for row in rows], query.device) if len(rows) > 1 else None
        for some in _in_parts(rows, sequences, sizes, query.shape[1]):
            members = [sequences[row] for row in some]
            if sizes is not None and len(some) > 1:
                out[some] = _attend_together(members, grouped[some], sizes, parameters).flatten(1, 2)
                continue
            for row, sequence in zip(some, members, strict=True):
                out[row] = sequence.attend_token(query[row], parameters)
    return out


def _in_parts(
    rows: list[int], sequences: Sequence_[Sequence], sizes: StepSizes | None, num_query_heads: int
) -> list[list[int]]:
    """Of the rows, whose rebuilt keys, and whose logits, take no more than so many bytes together."""
    if sizes is None:
        return [rows]
    first = sequences[rows[0]]
    num_tokens = sizes.num_candidates * first.config.chunk_size
    of_one = num_tokens * first.tail.keys[:, :1].numel() * first.tail.keys.itemsize
    # Of n sequences n queries meet at most n num_tokens / LEAST_SHARED keys.
    logits = num_query_heads * num_tokens * torch.float32.itemsize
    count = max(1, min(LARGEST_PART // of_one, math.isqrt(LARGEST_PART * LEAST_SHARED // logits)))
    return [rows[start : start + count] for start in range(0, len(rows), count)]


def _common_sizes(sequences: Sequence_[Sequence], device: torch.device) -> StepSizes | None:
    """What all of them select; None where they do not select alike, select nothing, or keep chunks for later steps."""
    segments = sequences[0].segments
    available = sum(segment.num_chunks - segment.exact_chunks.shape[1] for segment in segments)
    sizes = {step_sizes(it.config, _num_context(it), available, device) for it in sequences}
    [first, *others] = sizes
    return None if others or first.num_selected == 0 or first.num_slots else first


def _num_context(sequence: Sequence) -> int:
    return sequence.num_compressed + sequence.tail.num_tokens


def _attend_together(
    sequences: Sequence_[Sequence], query_BHGD: torch.Tensor, sizes: StepSizes, parameters: AttentionParameters
) -> torch.Tensor:
    """As `attend_sparsely` of each: [B, H, G, V]."""
    num_sequences, num_heads, num_groups, _ = query_BHGD.shape
    config, segments = sequences[0].config, sequences[0].segments
    # Queries by KV head; the same as heads of their own, a sequence after the other within each KV head.
    by_head = query_BHGD.transpose(0, 1).flatten(1, 2)
    query = by_head.unflatten(1, (num_sequences, num_groups)).flatten(0, 1)
    parameters = _for_all(parameters, num_sequences, num_heads)

    def of_all(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.view(num_heads, -1)

    scores = score_chunks(by_head, segments, parameters.scaling, parameters.softcap, num_sequences=num_sequences)
    candidates = select_chunks(scores, sizes.num_candidates)
    union, places_in_union = _union(of_all(candidates), sum(segment.num_chunks for segment in segments))
    if LEAST_SHARED * union.shape[1] <= of_all(candidates).shape[1]:
        keys = gather_keys(segments, union).flatten(1, 2)
        of_union = attention_logits(by_head, keys, parameters).reshape(*query.shape[:2], -1, config.chunk_size)
        places_in_union = places_in_union.view(len(candidates), 1, -1, 1)
        wanted = of_union.gather(2, places_in_union.expand(-1, num_groups, -1, config.chunk_size)).flatten(2)
    else:
        keys = gather_keys(segments, of_all(candidates)).reshape(len(candidates), -1, query.shape[2])
        wanted = attention_logits(query, keys, parameters)
    tail_keys, tail_values, is_padding = _tails(sequences, num_heads)
    tail_logits = attention_logits(query, tail_keys, parameters)
    tail_logits.view(num_heads, num_sequences, num_groups, -1).masked_fill_(is_padding.unsqueeze(1), -torch.inf)
    exact = [segment for segment in segments if segment.exact_chunks.shape[1]]
    exact_logits = [
        attention_logits(by_head, segment.exact_keys, parameters).view(*query.shape[:2], -1) for segment in exact
    ]
    logits = [wanted, tail_logits, *exact_logits]
    places: torch.Tensor | None = None
    if sizes.num_candidates > sizes.num_selected:
        places = select_tokens(attention_weights(logits, parameters)[0], sizes.num_selected * config.chunk_size)
        logits[0] = logits[0].gather(2, places.unsqueeze(1).expand(-1, num_groups, -1))
    tokens = chunk_tokens(candidates, config.chunk_size, places)
    values = gather_values(segments, of_all(tokens)).reshape(*tokens.shape, -1)
    selected, tail, *others = attention_weights(logits, parameters)
    out = weigh_values([selected, tail], [values, tail_values]).view(num_heads, num_sequences * num_groups, -1)
    if others:
        shared = [weights.reshape(*by_head.shape[:2], -1) for weights in others]
        out += weigh_values(shared, [segment.exact_values for segment in exact])
    _count(sequences, sizes, num_exact=sum(segment.exact_keys.shape[1] for segment in exact), num_heads=num_heads)
    attended: torch.Tensor = out.unflatten(1, (num_sequences, num_groups)).transpose(0, 1)
    return attended.to(query_BHGD.dtype)


def _union(chunks_Hn: torch.Tensor, num_chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The different chunks of each head [H, U], chunk 0 where a head has fewer, and where in it each is, [H, n]."""
    is_wanted = torch.zeros(len(chunks_Hn), num_chunks, dtype=torch.bool, device=chunks_Hn.device)
    is_wanted.scatter_(1, chunks_Hn, True)
    places = is_wanted.cumsum(1) - 1
    heads, wanted = is_wanted.nonzero(as_tuple=True)
    union = chunks_Hn.new_zeros(len(chunks_Hn), int(places[:, -1].max()) + 1)
    union[heads, places[heads, wanted]] = wanted
    return union, places.gather(1, chunks_Hn)


def _for_all(parameters: AttentionParameters, num_sequences: int, num_heads: int) -> AttentionParameters:
    if parameters.sinks is None:
        return parameters
    by_head = parameters.sinks.view(num_heads, 1, -1).expand(-1, num_sequences, -1)
    return replace(parameters, sinks=by_head.flatten())


def _tails(sequences: Sequence_[Sequence], num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tails' keys [H B, T, D] and values [H B, T, V], zeros beyond their ends, and what is beyond, [B, T]."""
    lengths = [it.tail.num_tokens for it in sequences]
    longest = max(lengths)
    first = sequences[0].tail
    shape = num_heads, len(sequences), longest
    keys, values = (like.new_zeros(*shape, like.shape[2]) for like in (first.keys, first.values))
    for row, (it, length) in enumerate(zip(sequences, lengths, strict=True)):
        keys[:, row, :length], values[:, row, :length] = it.tail.keys, it.tail.values
    places = torch.arange(longest, device=keys.device)
    is_padding = places >= torch.tensor(lengths, device=keys.device).unsqueeze(1)
    return keys.flatten(0, 1), values.flatten(0, 1), is_padding


def _count(sequences: Sequence_[Sequence], sizes: StepSizes, *, num_exact: int, num_heads: int) -> None:
    for it in sequences:
        it.counts.add(
            sizes,
            num_context=_num_context(it),
            num_exact=num_exact + it.tail.num_tokens,
            chunk_size=it.config.chunk_size,
        )
        it.counts.misses += num_heads * sizes.num_candidates
