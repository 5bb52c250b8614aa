"""The comparison of a shared batch with the ordinary path."""

from collections.abc import Callable

import torch
from torch import nn

# Of hidden states relative to their largest, where an extra column of padding changes nothing at all.
SMALLEST_TOLERANCE = 1e-6
FACTOR = 10


@torch.no_grad()
def verify_first_batch(
    ordinary_path: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shared_path: Callable[[], torch.Tensor],
    backbone: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> None:
    """Raises RuntimeError where the two paths' hidden states [N, L, H] differ on real tokens.

    Both run without dropout. What may differ is ten times what one more column of padding changes in the ordinary
    path, which is no change in exact arithmetic either.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    for module, _ in modes:
        module.training = False
    try:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pad = torch.zeros_like(input_ids[:, :1])
        ordinary = ordinary_path(input_ids, mask)
        wider = ordinary_path(torch.cat([input_ids, pad], 1), torch.cat([mask, pad.to(mask)], 1))[:, :-1]
        shared = shared_path()
    finally:
        for module, training in modes:
            module.training = training
    real = mask.bool()
    scale = float(ordinary[real].abs().max())
    noise = float((wider - ordinary)[real].abs().max())
    if not noise < float("inf"):
        raise RuntimeError(
            "the model gives NaN or infinity without prefix sharing, so there is nothing to compare with: check the "
            "batch, or pass verify_first_batch=False"
        )
    error = float((shared - ordinary)[real].abs().max())
    tolerance = FACTOR * max(noise, SMALLEST_TOLERANCE * scale, scale * _rounding(ordinary))
    if not error <= tolerance:
        raise RuntimeError(
            f"prefix sharing changes the hidden states of {type(backbone).__name__} by {error:.2e}, more than "
            f"{tolerance:.2e} (one more column of padding: {noise:.2e}): this model cannot share prefixes"
        )


def _rounding(output: torch.Tensor) -> float:
    """eps of the least precise type it was computed in: autocast's, although a last norm in fp32 gives fp32."""
    eps = torch.finfo(output.dtype).eps
    device = output.device.type
    if torch.is_autocast_enabled(device):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(device)).eps)
    return eps
