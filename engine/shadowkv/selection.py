"""Which chunks a decoding step considers, which of their tokens it attends to, and how those are brought.

Legend: H KV heads, G query heads per KV head, D head_dim, C chunks of all segments, m candidate chunks of c tokens,
t selected tokens. Chunks and tokens are numbered over all segments.
"""

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import torch

from longshadow.engine.shadowkv.config import ShadowKVConfig
from longshadow.engine.shadowkv.segment import Segment


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Chunks per KV head that a decoding step of one sequence selects, rebuilds keys for, and keeps afterwards."""

    num_selected: int
    num_candidates: int
    num_slots: int


def step_sizes(config: ShadowKVConfig, num_context: int, num_available: int, device: torch.device) -> StepSizes:
    """Sizes of a step over `num_context` tokens, `num_available` chunks of which can be selected."""
    num_selected = min(config.num_selected_chunks(num_context), num_available)
    num_candidates = min(round(config.candidate_factor * num_selected), num_available)
    num_slots = min(config.num_resident_chunks(num_candidates, device), num_available)
    return StepSizes(num_selected=num_selected, num_candidates=num_candidates, num_slots=num_slots)


def score_chunks(
    query_HGD: torch.Tensor,
    segments: Sequence_[Segment],
    scaling: float,
    softcap: float | None,
    *,
    num_sequences: int = 1,
) -> torch.Tensor:
    """Scores of the chunks of all segments, one after the other, per KV head [H, C].

    softmax over the chunks of scaling * query . landmark (soft-capped like attention's own logits), then the
    maximum over the query heads that share a KV head. Exact chunks, attended anyway, score -inf.

    Of several sequences, whose queries lie one after the other in G, each KV head has a row for each: [H B, C].
    """
    scaled = query_HGD * scaling
    logits = join([dot(scaled, segment.landmarks.slice(0, scaled.shape[0])) for segment in segments])
    logits = cap_logits(logits if logits.dtype == torch.float64 else logits.float(), softcap)
    starts = itertools.accumulate((segment.num_chunks for segment in segments), initial=0)
    excluded = join([segment.exact_chunks + start for segment, start in zip(segments, starts, strict=False)], dim=1)
    logits.scatter_(2, excluded.unsqueeze(1).expand(-1, logits.shape[1], -1), -torch.inf)
    scores: torch.Tensor = logits.softmax(-1).unflatten(1, (num_sequences, -1)).amax(2)
    return scores.scatter_(2, excluded.unsqueeze(1).expand(-1, num_sequences, -1), -torch.inf).flatten(0, 1)


def dot(query_HGD: torch.Tensor, rows_HnD: torch.Tensor) -> torch.Tensor:
    """query . row of each head, [H, G, n].

    The rows come first in the product: with few queries a CPU's matrix product is twice as fast that way.
    """
    return torch.bmm(rows_HnD, query_HGD.transpose(1, 2)).transpose(1, 2).contiguous()


def join(pieces: Sequence_[torch.Tensor], dim: int = 2) -> torch.Tensor:
    """`torch.cat` that does not copy a single piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)


def select_chunks(scores_HC: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """The `num_chunks` best chunks per KV head, [H, num_chunks], in no particular order."""
    return scores_HC.topk(num_chunks, dim=1, sorted=False).indices


def cap_logits(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """softcap * tanh(logits / softcap), or the logits themselves without a cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def select_tokens(weights_HGn: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The tokens with the largest attention weight in any query head of the group, [H, num_tokens], unordered."""
    return weights_HGn.amax(1).topk(num_tokens, dim=1, sorted=False).indices


def chunk_tokens(chunks_Hm: torch.Tensor, chunk_size: int, places_Ht: torch.Tensor | None = None) -> torch.Tensor:
    """Numbers of the chunks' tokens, [H, m c], or of those at some places among them, [H, t]."""
    if places_Ht is not None:
        return chunks_Hm.gather(1, places_Ht // chunk_size) * chunk_size + places_Ht % chunk_size
    offsets = torch.arange(chunk_size, device=chunks_Hm.device)
    return (chunks_Hm.unsqueeze(2) * chunk_size + offsets).flatten(1)


def gather_keys(segments: Sequence_[Segment], chunks_Hm: torch.Tensor) -> torch.Tensor:
    """Keys of each head's own chunks, [H, m, c, D]."""
    sources = [(segment.keys.gather, segment.num_chunks) for segment in segments]
    return _gather_across(sources, chunks_Hm)


def gather_values(segments: Sequence_[Segment], tokens_Ht: torch.Tensor) -> torch.Tensor:
    """Values of each head's own tokens, [H, t, D]."""
    sources = [(segment.values.gather_tokens, segment.num_tokens) for segment in segments]
    return _gather_across(sources, tokens_Ht)


def _gather_across(
    sources: Sequence_[tuple[Callable[[torch.Tensor], torch.Tensor], int]], numbers_Hk: torch.Tensor
) -> torch.Tensor:
    """What sources of so many items each give for items numbered over all of them, [H, k, ...]."""
    if len(sources) == 1:
        return sources[0][0](numbers_Hk)
    gathered: torch.Tensor | None = None
    heads = torch.arange(numbers_Hk.shape[0], device=numbers_Hk.device).unsqueeze(1)
    start = 0
    for gather, size in sources:
        # Heads ask a source for different numbers of items: pad with item 0 and write only what was asked.
        inside = (numbers_Hk >= start) & (numbers_Hk < start + size)
        width = int(inside.sum(1).max())
        if width:
            columns = inside.int().argsort(dim=1, descending=True, stable=True)[:, :width]
            wanted = inside.gather(1, columns)
            found = gather((numbers_Hk.gather(1, columns) - start).masked_fill_(~wanted, 0))
            if gathered is None:
                gathered = found.new_empty(*numbers_Hk.shape, *found.shape[2:])
            gathered[heads.expand_as(columns)[wanted], columns[wanted]] = found[wanted]
        start += size
    assert gathered is not None
    return gathered
