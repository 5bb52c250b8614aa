"""How much each completion of a group loss counts."""

import torch


def delta_l_weights(lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    """N L_i^-alpha / sum_j L_j^-alpha: the weights of delta-L normalisation (arXiv 2509.07558), with mean 1.

    The loss (1 / T_max) sum_i w_i / N sum_t l_it has the gradient's expectation for every alpha; alpha 1 gives it the
    least variance where a token's gradients are alike, 0 is Dr. GRPO's normalisation.

    Args:
        lengths: [N], trained tokens of each completion of the whole batch, over all processes. Empty ones weigh 0.
        alpha: from 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"delta_l must be from 0 to 1, got {alpha}")
    powers = lengths.clamp(min=1).double().pow(-alpha) * (lengths > 0)
    return (len(lengths) * powers / powers.sum().clamp(min=torch.finfo(powers.dtype).tiny)).float()
