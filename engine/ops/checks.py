"""What kernels cannot see: they know addresses and shapes, and would read or write elsewhere."""

import torch

MAXIMUM_GROUPS = 16


def check_contiguous(**tensors: torch.Tensor) -> None:
    """Raises ValueError for tensors, by name, that are not contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for {tuple(tensor.shape)}")


def check_workspace(workspace: torch.Tensor, num_elements: int) -> None:
    """Raises ValueError for a workspace with fewer elements, or not of fp32."""
    if workspace.numel() < num_elements or workspace.dtype != torch.float32:
        raise ValueError(
            f"workspace must be torch.float32 with {num_elements} elements or more, got {workspace.dtype} with "
            f"{workspace.numel()}"
        )


def check_query(query: torch.Tensor) -> None:
    """Raises ValueError for queries [B, H, G, D] with more query heads per KV head than a kernel's tile has rows."""
    if query.shape[2] > MAXIMUM_GROUPS:
        raise ValueError(f"kernels take 1 to {MAXIMUM_GROUPS} query heads per KV head, got {query.shape[2]}")
