"""Which chunks a decoding step attends to.

Legend: H KV heads, G query heads per KV head, D head_dim, C chunks of all segments, k selected chunks.
"""

import itertools
from collections.abc import Sequence as Sequence_

import torch

from longshadow.engine.shadowkv.segment import Segment


def score_chunks(
    query_HGD: torch.Tensor, segments: Sequence_[Segment], scaling: float, softcap: float | None
) -> torch.Tensor:
    """Scores of the chunks of all segments, one after the other, per KV head [H, C].

    softmax over the chunks of scaling * query . landmark (soft-capped like attention's own logits), then the
    maximum over the query heads that share a KV head. Exact chunks, attended anyway, score -inf.
    """
    scaled = query_HGD * scaling
    logits = join([dot(scaled, segment.landmarks.slice(0, scaled.shape[0])) for segment in segments])
    logits = cap_logits(logits if logits.dtype == torch.float64 else logits.float(), softcap)
    starts = itertools.accumulate((segment.num_chunks for segment in segments), initial=0)
    excluded = join([segment.exact_chunks + start for segment, start in zip(segments, starts, strict=False)], dim=1)
    logits.scatter_(2, excluded.unsqueeze(1).expand(-1, logits.shape[1], -1), -torch.inf)
    return logits.softmax(-1).amax(1).scatter_(1, excluded, -torch.inf)


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


def gather_chunks(segments: Sequence_[Segment], chunks_Hk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [H, k, c, D] of chunks given by their number over all segments."""
    if len(segments) == 1:
        return segments[0].keys.gather(chunks_Hk), segments[0].values.gather(chunks_Hk)
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    start = 0
    for segment in segments:
        # Heads ask a segment for different numbers of chunks: pad with chunk 0 and write only what was asked.
        inside = (chunks_Hk >= start) & (chunks_Hk < start + segment.num_chunks)
        width = int(inside.sum(1).max())
        if width:
            columns = inside.int().argsort(dim=1, descending=True, stable=True)[:, :width]
            wanted = inside.gather(1, columns)
            local = (chunks_Hk.gather(1, columns) - start).masked_fill_(~wanted, 0)
            found_keys, found_values = segment.keys.gather(local), segment.values.gather(local)
            if keys is None or values is None:
                keys = found_keys.new_empty(*chunks_Hk.shape, *found_keys.shape[2:])
                values = found_values.new_empty(*chunks_Hk.shape, *found_values.shape[2:])
            heads = torch.arange(chunks_Hk.shape[0], device=chunks_Hk.device).unsqueeze(1).expand_as(columns)
            keys[heads[wanted], columns[wanted]] = found_keys[wanted]
            values[heads[wanted], columns[wanted]] = found_values[wanted]
        start += segment.num_chunks
    assert keys is not None and values is not None
    return keys, values
