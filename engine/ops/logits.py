"""What the references of the scoring and attention operators share."""

import torch


def attention_logits(query_HGD: torch.Tensor, keys_HnD: torch.Tensor, scaling: float, softcap: float) -> torch.Tensor:
    """scaling * query . key, then softcap * tanh(logit / softcap) unless softcap is 0, in fp32: [H, G, n]."""
    logits = torch.bmm(query_HGD.float(), keys_HnD.float().transpose(1, 2)) * scaling
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def with_sinks(logits_HGn: torch.Tensor, sinks_HG: torch.Tensor | None) -> torch.Tensor:
    """The logits with the sinks' as one more column, if there are any."""
    if sinks_HG is None:
        return logits_HGn
    return torch.cat([logits_HGn, sinks_HG.to(logits_HGn).unsqueeze(2)], 2)
