"""`rebuild_keys` in PyTorch, one head and segment after the other.

Legend: B sequences, H KV heads, M chosen chunks, S slots, C chunks of c tokens of a segment, x missing ones among them,
r rank, D head_dim, P rotary pairs.
"""

import torch

from longshadow.engine.ops.rotary import RotaryStyle
from longshadow.engine.ops.tables import Field, read_packed, read_rows, tensor_at
from longshadow.engine.shadowkv.rope import Rotation, rotate


def rebuild_keys(
    table: torch.Tensor,
    chosen: torch.Tensor,
    slots: torch.Tensor,
    misses: torch.Tensor,
    num_misses: torch.Tensor,
    kind: int,
    rotary_style: int,
    rotary_dim: int,
    key_slots: torch.Tensor,
    rotation_fp32: bool = True,
) -> None:
    """See the package."""
    for sequence, segments in enumerate(read_rows(table)):
        for head in range(key_slots.shape[1]):
            missing = misses[sequence, head, : int(num_misses[sequence, head])].long()
            chunks = chosen[sequence, head, missing].long()
            targets = slots[sequence, head, missing].long()
            for segment in segments:
                local = chunks - segment[Field.FIRST_CHUNK]
                inside = (local >= 0) & (local < segment[Field.NUM_CHUNKS])
                key_slots[sequence, head, targets[inside]] = _rebuild(
                    segment, head, local[inside], key_slots, kind, rotary_style, rotary_dim, rotation_fp32
                )


def _rebuild(
    segment: list[int],
    head: int,
    chunks: torch.Tensor,
    like: torch.Tensor,
    kind: int,
    rotary_style: int,
    rotary_dim: int,
    rotation_fp32: bool,
) -> torch.Tensor:
    """Keys of some chunks of a segment and head, [x, c, D], on the device and in the dtype of the slots."""
    _, num_heads, _, chunk_size, head_dim = like.shape
    dtype, device = like.dtype, like.device
    num_chunks, rank = segment[Field.NUM_CHUNKS], segment[Field.RANK]
    coefficients = read_packed(
        segment[Field.COEFFICIENTS],
        segment[Field.COEFFICIENT_SCALES],
        (num_chunks, chunk_size, rank),
        kind,
        dtype,
        device,
    )
    rows = coefficients[chunks].to(dtype).flatten(0, 1)
    basis = tensor_at(segment[Field.BASIS], (num_heads, rank, head_dim), dtype, device)[head]
    mean = tensor_at(segment[Field.MEAN], (num_heads, head_dim), dtype, device)[head]
    keys = torch.addmm(mean, rows, basis)
    layout = RotaryStyle(rotary_style).layout(rotary_dim)
    if layout is not None:
        shape = (num_chunks, chunk_size, rotary_dim // 2)
        cos, sin = (
            tensor_at(segment[field], shape, torch.float32 if rotation_fp32 else dtype, device)[chunks].flatten(0, 1)
            for field in (Field.COS, Field.SIN)
        )
        keys = rotate(keys, Rotation(cos, sin), layout).to(dtype)
    chunks_of_keys: torch.Tensor = keys.unflatten(0, (-1, chunk_size))
    return chunks_of_keys
