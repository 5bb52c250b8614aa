"""What compressing a prompt needs to know of its keys, read once by an operator.

Legend: H KV heads, n tokens, c chunk size, C = n / c chunks, D head_dim, W = H x D.
"""

from dataclasses import dataclass

import torch

from longshadow.engine.ops import Operators
from longshadow.engine.ops.rotary import RotaryStyle
from longshadow.engine.ops.summarize_keys import summarize_keys_workspace
from longshadow.engine.shadowkv.rope import RotaryLayout, Rotation


@dataclass(frozen=True, eq=False, kw_only=True)
class KeySummary:
    """Of some post-RoPE keys.

    Attributes:
        plain_nW: the keys before RoPE, all heads of a token together, in the keys' dtype.
        landmarks_HCD, min_cosine_HC: see `summarize_chunks`.
        gram_WW, key_sum_W: plain^T plain, and the sum of plain, fp32.
    """

    plain_nW: torch.Tensor
    landmarks_HCD: torch.Tensor
    min_cosine_HC: torch.Tensor
    gram_WW: torch.Tensor
    key_sum_W: torch.Tensor


def summarize(
    keys_HnD: torch.Tensor,
    rotation: Rotation | None,
    layout: RotaryLayout | None,
    chunk_size: int,
    operators: Operators,
) -> KeySummary:
    """Summary of n keys, a multiple of the chunk size, in one pass over them by `operators.summarize_keys`."""
    num_heads, num_tokens, head_dim = keys_HnD.shape
    width, num_chunks = num_heads * head_dim, num_tokens // chunk_size

    def floats(*shape: int) -> torch.Tensor:
        return keys_HnD.new_empty(shape, dtype=torch.float32)

    summary = KeySummary(
        plain_nW=keys_HnD.new_empty(num_tokens, width),
        landmarks_HCD=floats(num_heads, num_chunks, head_dim),
        min_cosine_HC=floats(num_heads, num_chunks),
        gram_WW=floats(width, width).zero_(),
        key_sum_W=floats(width).zero_(),
    )
    operators.summarize_keys(
        keys_HnD,
        None if rotation is None else rotation.cos,
        None if rotation is None else rotation.sin,
        RotaryStyle.of(layout),
        0 if layout is None else layout.rotary_dim,
        chunk_size,
        None,
        summary.plain_nW,
        summary.landmarks_HCD,
        summary.min_cosine_HC,
        summary.gram_WW,
        summary.key_sum_W,
        floats(summarize_keys_workspace(num_heads, num_tokens, head_dim, chunk_size)),
    )
    return summary
