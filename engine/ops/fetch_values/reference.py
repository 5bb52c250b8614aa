"""`fetch_values` in PyTorch, one head and segment after the other.

Legend: B sequences, H KV heads, S slots, T places, C chunks of c tokens of a segment, V head_dim of values.
"""

import torch

from longshadow.engine.ops.tables import Field, read_packed, read_rows


def fetch_values(
    table: torch.Tensor,
    slot_chunks: torch.Tensor,
    places: torch.Tensor,
    kind: int,
    has_values: torch.Tensor,
    value_slots: torch.Tensor,
) -> None:
    """See the package."""
    _, num_heads, _, chunk_size, head_dim = value_slots.shape
    for sequence, segments in enumerate(read_rows(table)):
        for head in range(num_heads):
            wanted = places[sequence, head].long()
            wanted = wanted[wanted >= 0]
            present, slots = has_values[sequence, head].view(-1), value_slots[sequence, head].view(-1, head_dim)
            missing = wanted[present[wanted] == 0]
            chunks, offsets = slot_chunks[sequence, head].long()[missing // chunk_size], missing % chunk_size
            for segment in segments:
                num_chunks, local = segment[Field.NUM_CHUNKS], chunks - segment[Field.FIRST_CHUNK]
                inside = (local >= 0) & (local < num_chunks)
                values = read_packed(
                    segment[Field.VALUES],
                    segment[Field.VALUE_SCALES],
                    (num_heads, num_chunks, chunk_size, head_dim),
                    kind,
                    value_slots.dtype,
                    value_slots.device,
                )
                slots[missing[inside]] = values[head, local[inside], offsets[inside]].to(slots.dtype)
            present[missing] = 1
