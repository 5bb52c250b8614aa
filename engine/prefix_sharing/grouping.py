"""Completions of one prompt into one micro-batch: a group can only share its prompt within a batch."""

from collections.abc import Sequence
from typing import Any

import torch


def regroup(batches: Sequence[dict[str, Any]], generator: torch.Generator) -> list[dict[str, Any]]:
    """The same rows in as many equal batches, ordered by prompt; the prompts in random order.

    Args:
        batches: dictionaries whose tensors and lists have one entry per row, such as TRL's shuffled micro-batches;
            tensors without dimensions and None stay with the batch. `prompt_ids` and `prompt_mask` [rows, columns]
            tell the prompts apart.
        generator: of the random order, on the CPU.

    Batches with anything else per row (images, split by their own sizes) come back as they are.
    """
    sizes = {len(batch["prompt_ids"]) for batch in batches}
    if len(sizes) != 1 or any(not _is_per_row(value, sizes) for batch in batches for value in batch.values()):
        return list(batches)
    [size] = sizes
    prompts = torch.cat([batch["prompt_ids"] * batch["prompt_mask"] for batch in batches])
    lengths = torch.cat([batch["prompt_mask"].sum(1) for batch in batches])
    _, group = torch.cat([lengths.unsqueeze(1).to(prompts), prompts], 1).unique(dim=0, return_inverse=True)
    place = torch.randperm(int(group.max()) + 1, generator=generator).to(group.device)
    order = place[group].argsort(stable=True)
    regrouped = [dict(batch) for batch in batches]
    for key, value in batches[0].items():
        if value is None or (isinstance(value, torch.Tensor) and value.dim() == 0):
            continue
        if isinstance(value, torch.Tensor):
            rows: Any = torch.cat([batch[key] for batch in batches])[order]
        else:
            joined = [entry for batch in batches for entry in batch[key]]
            rows = [joined[row] for row in order.tolist()]
        for index, batch in enumerate(regrouped):
            batch[key] = rows[index * size : (index + 1) * size]
    return regrouped


def _is_per_row(value: Any, sizes: set[int]) -> bool:
    if value is None:
        return True
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 or len(value) in sizes
    return isinstance(value, list) and len(value) in sizes
