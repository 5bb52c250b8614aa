"""What stands for a chunk of keys on the device: its mean, and the chunks whose mean describes them badly.

Legend: H KV heads, n tokens, c chunk size, C = n / c chunks, D head_dim.
"""

import torch


def summarize_chunks(keys_HnD: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Landmark of each chunk and how well it stands for the chunk's keys (arXiv 2410.21465, algorithm 1).

    Returns the mean post-RoPE key per chunk [H, C, D] (fp32 or better) and the smallest cosine similarity
    between a key of the chunk and that mean [H, C].
    """
    chunks = keys_HnD.unflatten(1, (-1, chunk_size))
    chunks = chunks if chunks.dtype in (torch.float32, torch.float64) else chunks.float()
    landmarks = chunks.mean(2)
    dots = (chunks @ landmarks.unsqueeze(-1)).squeeze(-1)
    norms = chunks.norm(dim=-1) * landmarks.norm(dim=-1, keepdim=True)
    cosines = dots / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return landmarks, cosines.amin(-1)


def choose_exact_chunks(min_cosine_HC: torch.Tensor, num_sink: int, num_outlier: int) -> torch.Tensor:
    """Chunks to keep exactly: the first `num_sink`, then the `num_outlier` with the lowest cosine, per head.

    Returns ascending chunk indices [H, min(C, num_sink + num_outlier)].
    """
    num_heads, num_chunks = min_cosine_HC.shape
    num_sink = min(num_sink, num_chunks)
    num_outlier = min(num_outlier, num_chunks - num_sink)
    sinks = torch.arange(num_sink, device=min_cosine_HC.device).expand(num_heads, -1)
    outliers = min_cosine_HC[:, num_sink:].topk(num_outlier, largest=False).indices + num_sink
    return torch.cat([sinks, outliers], 1).sort(1).values
