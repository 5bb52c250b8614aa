"""`plan_chunks` in CUDA C++, csrc/plan_chunks.cu: a hash table in shared memory, a block per row."""

import torch

from longshadow.engine.ops.backend import next_implementation

# Chosen chunks and slots are numbered in 16 bits, and must fit into the shared memory of a block.
MAXIMUM_SLOTS = 16384


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
    """See the package. More than 16,384 slots are left to the next backend."""
    arguments = (chosen, slot_chunks, last_used, has_values, step, slots, misses, num_misses)
    if slot_chunks.shape[2] <= MAXIMUM_SLOTS:
        torch.ops.longshadow.plan_chunks_cuda(*arguments)
    else:
        next_implementation("plan_chunks", "cuda", chosen.device)(*arguments)
