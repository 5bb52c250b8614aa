"""Prompts that go on from the same segments, questions on one document: they see these together.

Legend: Hq query heads, H KV heads, T tokens of a prompt, D head_dim, V that of values.
"""

from collections.abc import Sequence as Sequence_

import torch

from longshadow.engine.shadowkv.exact import AttentionParameters, OnlineSoftmax
from longshadow.engine.shadowkv.sequence import Sequence, rows_by_segments


def begin_together(
    sequences: Sequence_[Sequence], queries: Sequence_[torch.Tensor], value_dim: int, parameters: AttentionParameters
) -> list[OnlineSoftmax | None]:
    """Attention of each prompt's tokens [Hq, T, D] to its segments: keys are rebuilt once for all that share them.

    None for a prompt that shares its segments with no other and begins by itself. Values are [.., V].
    """
    begun: list[OnlineSoftmax | None] = [None] * len(sequences)
    for rows in rows_by_segments(sequences):
        first = sequences[rows[0]]
        if len(rows) == 1 or not first.segments:
            continue
        num_kv_heads = first.segments[0].exact_chunks.shape[0]
        online = OnlineSoftmax(torch.cat([queries[row] for row in rows], 1), num_kv_heads, value_dim, parameters)
        for keys, values in first.compressed_history():
            online.add(keys, values)
        for row, part in zip(rows, online.split([queries[row].shape[1] for row in rows]), strict=True):
            begun[row] = part
    return begun
