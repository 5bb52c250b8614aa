"""TRL's fused LM head on labelled cells only: a prompt's hidden states never meet the vocabulary.

TRL compacts them itself on devices with Triton; elsewhere it projects every cell of the padded batch. Here the
backbone hands over the labelled cells as one row, TRL's head scores that row, and the results go back to their cells.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from longshadow.engine.switching.interception import intercept

# The keyword that tells a sharing backbone which cells [N, L] the head wants.
LABELLED = "longshadow_labelled_cells"


@contextmanager
def project_labelled_cells(model: PreTrainedModel) -> Iterator[None]:
    """Within, `model(..., labels=..., fused_lm_head=True)` projects labelled cells only; other calls are as always.

    The model's backbone must be sharing prefixes. Without TRL's fused head (before 1.15) nothing changes.
    """
    undo = intercept(model, _labelled_forward)
    try:
        yield
    finally:
        undo()


def _labelled_forward(model: nn.Module, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
    labels = kwargs.get("labels")
    if not kwargs.get("fused_lm_head") or labels is None or kwargs.get("shift_labels") is not None:
        return forward(**kwargs)
    labelled = labels[:, 1:] != -100
    if not labelled.any():
        return forward(**kwargs)
    row = labels[:, 1:][labelled].unsqueeze(0)
    kwargs["labels"] = F.pad(row, (1, 0), value=-100)
    output = forward(**{LABELLED: F.pad(labelled, (0, 1))}, **kwargs)
    for field in dataclasses.fields(output):
        value = getattr(output, field.name)
        if isinstance(value, torch.Tensor) and value.shape == row.shape:
            setattr(output, field.name, value.new_zeros(labelled.shape).masked_scatter(labelled, value))
    return output
