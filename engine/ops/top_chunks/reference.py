"""`top_chunks` in PyTorch: a stable sort."""

import torch


def top_chunks(scores: torch.Tensor, counts: torch.Tensor, chosen: torch.Tensor) -> None:
    """See the package."""
    num_scores = scores.shape[2]
    finite = scores.isfinite()
    num_chosen = torch.minimum(counts.unsqueeze(1), finite.sum(2)).unsqueeze(2)
    # -0 + 0 is 0: both are equal, however a device sorts them.
    order = (scores.masked_fill(~finite, -torch.inf) + 0.0).argsort(dim=2, descending=True, stable=True)
    best = order[:, :, : chosen.shape[2]]
    taken = torch.arange(best.shape[2], device=best.device) < num_chosen
    places = best.masked_fill(~taken, num_scores).sort(2).values
    chosen.fill_(-1)
    chosen[:, :, : places.shape[2]] = places.masked_fill(places == num_scores, -1)
