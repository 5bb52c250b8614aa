"""`append_tokens` in PyTorch, one sequence after the other."""

import torch

from longshadow.engine.ops.tables import RegionField, read_region


def append_tokens(keys: torch.Tensor, values: torch.Tensor, tail_tokens: torch.Tensor, regions: torch.Tensor) -> None:
    """See the package."""
    for sequence, num_tokens in enumerate(tail_tokens.tolist()):
        regions[sequence, -1, RegionField.LENGTH] = num_tokens
        if num_tokens:
            row, num_heads = regions[sequence, -1].tolist(), keys.shape[1]
            for part, new in ((RegionField.KEYS, keys[sequence]), (RegionField.VALUES, values[sequence])):
                read_region(row, part, num_heads, new.shape[1], new.dtype, new.device)[:, -1] = new
