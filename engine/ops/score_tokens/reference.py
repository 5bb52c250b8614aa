"""`score_tokens` in PyTorch: the specification."""

import torch

from longshadow.engine.ops.logits import attention_logits, with_sinks
from longshadow.engine.ops.tables import RegionField, read_region, read_rows


def score_tokens(
    query: torch.Tensor,
    slots: torch.Tensor,
    key_slots: torch.Tensor,
    regions: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float,
    scores: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """See the package."""
    _, num_heads, _, key_dim = query.shape
    heads = torch.arange(num_heads, device=query.device).unsqueeze(1)
    for index, rows in enumerate(read_rows(regions)):
        slots_HM = slots[index].long()
        missing_Hn = (slots_HM < 0).repeat_interleave(key_slots.shape[3], 1)
        exact = [read_region(row, RegionField.KEYS, num_heads, key_dim, query.dtype, query.device) for row in rows]
        keys = torch.cat([key_slots[index][heads, slots_HM.clamp(min=0)].flatten(1, 2), *exact], 1)
        logits = attention_logits(query[index], keys, scaling, softcap)
        num_candidates = missing_Hn.shape[1]
        logits[:, :, :num_candidates].masked_fill_(missing_Hn.unsqueeze(1), -torch.inf)
        weights = with_sinks(logits, sinks).softmax(-1)[:, :, :num_candidates]
        scores[index] = weights.amax(1).masked_fill(missing_Hn, -torch.inf)
