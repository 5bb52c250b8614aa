"""Completions of one prompt into one micro-batch: a group can only share its prompt within a batch.

Rows may change places only within one optimizer step, and only where everything that a step computes is a sum over
its rows. Then the step is the same, whatever the micro-batches.
"""

from collections.abc import Sequence
from typing import Any

import torch

# GRPO's losses that weigh each row by itself, or by a divisor that all rows of a step have in common.
SUMS_OVER_ROWS = {"grpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"}


def why_micro_batches_stay(trainer: Any) -> str | None:
    """Names what a GRPO or RLOO trainer computes over the rows of a micro-batch together; None: nothing."""
    args = trainer.args
    loss = getattr(args, "loss_type", None)
    if loss is not None and loss not in SUMS_OVER_ROWS:
        return f"loss_type={loss!r} is not known to be a sum over rows"
    if getattr(args, "top_entropy_quantile", 1.0) < 1:
        return "top_entropy_quantile ranks the tokens of a micro-batch"
    if getattr(args, "entropy_coef", 0.0) or getattr(args, "use_adaptive_entropy", False):
        return "the entropy bonus is a mean over the tokens of a micro-batch"
    if getattr(trainer, "aux_loss_enabled", False):
        return "the experts' load balance is counted over a micro-batch"
    if getattr(trainer, "use_liger_kernel", False) and hasattr(trainer, "liger_grpo_loss"):
        return "Liger's loss has divisors of its own"
    if per_step(args) == 1:
        return "a generation's micro-batches do not fill whole optimizer steps"
    return None


def per_step(args: Any) -> int:
    """Counts the neighbouring micro-batches of a generation that surely go into one optimizer step."""
    generated, accumulated = args.steps_per_generation, args.gradient_accumulation_steps
    if generated % accumulated == 0:
        return int(accumulated)
    return int(generated) if accumulated % generated == 0 else 1


def regroup(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in as many equal batches, ordered by prompt.

    Args:
        batches: dictionaries whose tensors and lists have one entry per row, such as TRL's shuffled micro-batches;
            tensors without dimensions and None stay with the batch. `prompt_ids` and `prompt_mask` [rows, columns]
            tell the prompts apart.

    Batches with anything else per row (images, split by their own sizes) come back as they are.
    """
    sizes = {len(batch["prompt_ids"]) for batch in batches}
    if len(sizes) != 1 or any(not _is_per_row(value, sizes) for batch in batches for value in batch.values()):
        return list(batches)
    [size] = sizes
    prompts = torch.cat([batch["prompt_ids"] * batch["prompt_mask"] for batch in batches])
    lengths = torch.cat([batch["prompt_mask"].sum(1) for batch in batches])
    _, group = torch.cat([lengths.unsqueeze(1).to(prompts), prompts], 1).unique(dim=0, return_inverse=True)
    order = group.argsort(stable=True)
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
