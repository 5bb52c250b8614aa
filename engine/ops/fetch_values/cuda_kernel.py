"""`fetch_values` in CUDA C++, csrc/fetch_values.cu: one launch reads all missing values, 16 bytes at a time."""

import torch


def fetch_values(
    table: torch.Tensor,
    slot_chunks: torch.Tensor,
    places: torch.Tensor,
    kind: int,
    has_values: torch.Tensor,
    value_slots: torch.Tensor,
) -> None:
    """See the package."""
    torch.ops.longshadow.fetch_values_cuda(table, slot_chunks, places, kind, has_values, value_slots)
