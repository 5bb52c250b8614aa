"""Which chunks a decoding step attends to.

Legend: H KV heads, G query heads per KV head, D head_dim, C chunks of all segments, k selected chunks.
"""

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
    logits = torch.cat(
        [
            torch.bmm(query_HGD, segment.landmarks.slice(0, query_HGD.shape[0]).transpose(1, 2))
            for segment in segments
        ],
        dim=2,
    )
    logits = logits.float() if logits.dtype != torch.float64 else logits
    logits = cap_logits(logits * scaling, softcap)
    start = 0
    for segment in segments:
        part = logits[:, :, start : start + segment.num_chunks]
        part.scatter_(2, segment.exact_chunks.unsqueeze(1).expand(-1, part.shape[1], -1), -torch.inf)
        start += segment.num_chunks
    excluded = torch.isneginf(logits[:, 0])
    return logits.softmax(-1).amax(1).masked_fill_(excluded, -torch.inf)


def select_chunks(scores_HC: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """The `num_chunks` best chunks per KV head, [H, num_chunks], in no particular order."""
    return scores_HC.topk(num_chunks, dim=1, sorted=False).indices


def cap_logits(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """softcap * tanh(logits / softcap), or the logits themselves without a cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def gather_chunks(
    segments: Sequence_[Segment], chunks_Hk: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
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
