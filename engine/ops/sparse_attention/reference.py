"""`sparse_attention` in PyTorch: the specification."""

import torch

from longshadow.engine.ops.logits import attention_logits, with_sinks
from longshadow.engine.ops.tables import RegionField, read_region, read_rows


def sparse_attention(
    query: torch.Tensor,
    places: torch.Tensor,
    key_slots: torch.Tensor,
    value_slots: torch.Tensor,
    regions: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """See the package."""
    num_heads = query.shape[1]
    heads = torch.arange(num_heads, device=query.device).unsqueeze(1)

    def joined(index: int, slots: torch.Tensor, part: RegionField, rows: list[list[int]]) -> torch.Tensor:
        chosen = slots[index].flatten(1, 2)[heads, places[index].long().clamp(min=0)]
        # Slots that were never written may hold NaN.
        chosen = chosen.masked_fill((places[index] < 0).unsqueeze(2), 0)
        width, dtype = slots.shape[4], slots.dtype
        exact = (read_region(row, part, num_heads, width, dtype, query.device) for row in rows)
        return torch.cat([chosen, *exact], 1)

    for index, rows in enumerate(read_rows(regions)):
        keys = joined(index, key_slots, RegionField.KEYS, rows)
        logits = attention_logits(query[index], keys, scaling, softcap)
        logits[:, :, : places.shape[2]].masked_fill_((places[index] < 0).unsqueeze(1), -torch.inf)
        lse[index] = with_sinks(logits, sinks).logsumexp(2)
        # Without anything to attend to the log-sum-exp is -inf, and all weights are 0.
        weights = (logits - lse[index].unsqueeze(2).clamp(min=torch.finfo(torch.float32).min)).exp()
        values = joined(index, value_slots, RegionField.VALUES, rows)
        out[index] = torch.bmm(weights, values.float()).to(out.dtype)
