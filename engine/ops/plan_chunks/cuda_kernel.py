"""`plan_chunks` in CUDA C++, csrc/plan_chunks.cu: a hash table in shared memory, a block per row."""

import torch


def plan_chunks(
    chosen: torch.Tensor,
    slot_chunks: torch.Tensor,
    last_used: torch.Tensor,
    has_values: torch.Tensor,
    step: torch.Tensor,
    slots: torch.Tensor,
    misses: torch.Tensor,
    num_misses: torch.Tensor,
) -> None:
    """See the package. Raises RuntimeError for sizes that do not fit into shared memory, M > 4096 or S > 16384."""
    torch.ops.longshadow.plan_chunks_cuda(chosen, slot_chunks, last_used, has_values, step, slots, misses, num_misses)
