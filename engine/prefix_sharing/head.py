"""TRL's fused LM head on labelled cells only: a prompt's hidden states never meet the vocabulary.

TRL compacts them itself on devices with Triton; elsewhere it projects every cell of the padded batch. Here the
backbone hands over the labelled cells as one row, TRL's head scores that row, and the results go back to their cells.
"""

import dataclasses
import functools
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

# The keyword that tells a sharing backbone which cells [N, L] the head wants.
LABELLED = "longshadow_labelled_cells"
_WHOLE = "_longshadow_whole_forward"


def project_labelled_cells(model: PreTrainedModel) -> None:
    """`model(..., labels=..., fused_lm_head=True)` projects labelled cells only; other calls stay as they are.

    The model's backbone must be sharing prefixes. Without TRL's fused head (before 1.15) nothing changes.
    """
    assert not hasattr(model, _WHOLE)
    setattr(model, _WHOLE, vars(model).get("forward"))
    original = model.forward

    # Under the original's signature, which `generate` checks its arguments against.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return _labelled_forward(original, *args, **kwargs)

    model.forward = MethodType(forward, model)


def project_every_cell(model: PreTrainedModel) -> None:
    """Takes `project_labelled_cells` back, where it was done."""
    if hasattr(model, _WHOLE):
        replaced = getattr(model, _WHOLE)
        delattr(model, _WHOLE)
        del model.forward
        if replaced is not None:
            model.forward = replaced


def _labelled_forward(original: Any, *args: Any, **kwargs: Any) -> Any:
    labels = kwargs.get("labels")
    if not kwargs.get("fused_lm_head") or labels is None or kwargs.get("shift_labels") is not None:
        return original(*args, **kwargs)
    labelled = labels[:, 1:] != -100
    if not labelled.any():
        return original(*args, **kwargs)
    row = labels[:, 1:][labelled].unsqueeze(0)
    kwargs["labels"] = F.pad(row, (1, 0), value=-100)
    output = original(*args, **{LABELLED: F.pad(labelled, (0, 1))}, **kwargs)
    for field in dataclasses.fields(output):
        value = getattr(output, field.name)
        if isinstance(value, torch.Tensor) and value.shape == row.shape:
            setattr(output, field.name, value.new_zeros(labelled.shape).masked_scatter(labelled, value))
    return output
