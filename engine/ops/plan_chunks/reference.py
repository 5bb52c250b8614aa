"""`plan_chunks` in PyTorch; of one sequence's chunks, `ResidentChunks` does the same.

Legend: B sequences, H KV heads, M chosen chunks, S slots.
"""

import torch


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
    """See the package. Raises ValueError for fewer slots than chosen chunks."""
    num_chosen, num_slots = chosen.shape[2], slot_chunks.shape[2]
    if num_slots < num_chosen:
        raise ValueError(f"there must be a slot for each of the {num_chosen} chosen chunks, not {num_slots}")
    wanted_BHM = chosen >= 0
    matches_BHMS = (chosen.unsqueeze(3) == slot_chunks.unsqueeze(2)) & wanted_BHM.unsqueeze(3)
    hits_BHM, found_BHM = matches_BHMS.max(3)
    missing_BHM = wanted_BHM & ~hits_BHM

    age_BHS = last_used.long().masked_fill(matches_BHMS.any(2), torch.iinfo(torch.int64).max)
    victims_BHS = age_BHS.argsort(dim=2, stable=True)
    nth_BHM = (missing_BHM.cumsum(2) - 1).clamp(min=0)
    target_BHM = torch.where(hits_BHM, found_BHM, victims_BHS.gather(2, nth_BHM))
    slots.copy_(target_BHM.masked_fill(~wanted_BHM, -1))

    _write(slot_chunks, target_BHM, wanted_BHM, chosen)
    _write(last_used, target_BHM, wanted_BHM, step.expand_as(chosen))
    renewed_BHS = torch.zeros_like(last_used)
    _write(renewed_BHS, target_BHM, missing_BHM, torch.ones_like(chosen))
    has_values.masked_fill_(renewed_BHS.bool().unsqueeze(3), 0)

    num_misses.copy_(missing_BHM.sum(2))
    missing_first_BHM = (~missing_BHM).int().argsort(dim=2, stable=True)
    beyond = torch.arange(num_chosen, device=chosen.device) >= num_misses.unsqueeze(2)
    misses.copy_(missing_first_BHM.masked_fill(beyond, -1))


def _write(
    target_BHS: torch.Tensor, slots_BHM: torch.Tensor, where_BHM: torch.Tensor, source_BHM: torch.Tensor
) -> None:
    """target[slots] = source, where it says so; what is left out goes to a slot too many."""
    num_slots = target_BHS.shape[2]
    padded = torch.cat([target_BHS, target_BHS.new_zeros(*target_BHS.shape[:2], 1)], 2)
    padded.scatter_(2, slots_BHM.masked_fill(~where_BHM, num_slots), source_BHM.to(padded.dtype))
    target_BHS.copy_(padded[:, :, :num_slots])
