"""`summarize_keys` in PyTorch.

Legend: H KV heads, n tokens, c chunk size, D head_dim, W = H D.
"""

import torch

from longshadow.engine.ops.rotary import RotaryStyle
from longshadow.engine.shadowkv.landmarks import summarize_chunks
from longshadow.engine.shadowkv.rope import Rotation, unrotate


def summarize_keys(
    keys: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotary_style: int,
    rotary_dim: int,
    chunk_size: int,
    weights: torch.Tensor | None,
    plain: torch.Tensor,
    landmarks: torch.Tensor,
    min_cosine: torch.Tensor,
    gram: torch.Tensor,
    key_sum: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """See the package; needs no workspace."""
    means, cosines = summarize_chunks(keys, chunk_size)
    landmarks.copy_(means)
    min_cosine.copy_(cosines)
    layout = RotaryStyle(rotary_style).layout(rotary_dim)
    unrotated = keys
    if layout is not None:
        assert cos is not None and sin is not None
        unrotated = unrotate(keys, Rotation(cos, sin), layout)
    plain.copy_(unrotated.transpose(0, 1).flatten(1))
    joint = plain.to(gram.dtype)
    if weights is not None:
        joint = joint * weights
    gram += joint.T @ joint
    key_sum += joint.sum(0)
