"""`top_chunks` in CUDA C++, csrc/top_chunks.cu: radix select, a block per row."""

import torch


def top_chunks(scores: torch.Tensor, counts: torch.Tensor, chosen: torch.Tensor) -> None:
    """See the package."""
    torch.ops.longshadow.top_chunks_cuda(scores, counts, chosen)
