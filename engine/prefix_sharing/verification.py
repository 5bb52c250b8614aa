"""The comparison of shared batches with the ordinary path: the first of each kind."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from longshadow.engine.prefix_sharing.tree import PrefixTree
from longshadow.engine.prefix_sharing.undisturbed import undisturbed

# Of hidden states relative to their largest, where an extra column of padding changes nothing at all.
SMALLEST_TOLERANCE = 1e-6
FACTOR = 10
# Forwards of a comparison.
NUM_PASSES = 3


def kind_of(tree: PrefixTree) -> tuple[bool, int]:
    """Batches of one kind are padded alike, and share alike to a factor of two."""
    return tree.padded_left, int(math.log2(tree.token_ratio))


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """The ordinary path's results for a batch, and the difference that is allowed on real tokens.

    That is ten times what one more column of padding changes in the ordinary path, which is no change in exact
    arithmetic either.

    Attributes:
        ordinary: hidden states [N, L, H].
        real: [N, L] (bool).
        noise: what one more column changes.
    """

    ordinary: torch.Tensor
    real: torch.Tensor
    noise: float

    @classmethod
    def of(
        cls,
        ordinary_path: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        backbone: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> "Comparison":
        """Runs the path without dropout, and leaves nothing behind in the backbone."""
        pad = torch.zeros_like(input_ids[:, :1])
        with undisturbed(backbone, input_ids.device):
            ordinary = ordinary_path(input_ids, attention_mask)
        with undisturbed(backbone, input_ids.device):
            mask = torch.cat([attention_mask, pad.to(attention_mask)], 1)
            wider = ordinary_path(torch.cat([input_ids, pad], 1), mask)[:, :-1]
        real = attention_mask.bool()
        return cls(ordinary=ordinary, real=real, noise=float((wider - ordinary)[real].abs().max()))

    @property
    def is_finite(self) -> bool:
        return self.noise < float("inf")

    def difference(self, shared: torch.Tensor) -> str | None:
        """Distance of hidden states [N, L, H] from these; None where they agree."""
        scale = float(self.ordinary[self.real].abs().max())
        error = float((shared - self.ordinary)[self.real].abs().max())
        tolerance = FACTOR * max(self.noise, SMALLEST_TOLERANCE * scale, scale * _rounding(self.ordinary))
        if error <= tolerance:
            return None
        return f"by {error:.2e}, more than {tolerance:.2e} (one more column of padding: {self.noise:.2e})"


def why_different(
    ordinary_path: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shared_path: Callable[[], torch.Tensor],
    backbone: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> str | None:
    """Describes in a sentence how the two paths differ on a batch; None where they agree."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    comparison = Comparison.of(ordinary_path, backbone, input_ids, mask)
    if not comparison.is_finite:
        return (
            "the model gives NaN or infinity without prefix sharing, so there is nothing to compare with: check the "
            "batch, or pass verify_first_batch=False"
        )
    with undisturbed(backbone, input_ids.device):
        shared = shared_path()
    difference = comparison.difference(shared)
    if difference is None:
        return None
    return (
        f"prefix sharing changes the hidden states of {type(backbone).__name__} {difference}: this model cannot share "
        "prefixes"
    )


def _rounding(output: torch.Tensor) -> float:
    """eps of the least precise type it was computed in: autocast's, although a last norm in fp32 gives fp32."""
    eps = torch.finfo(output.dtype).eps
    device = output.device.type
    if torch.is_autocast_enabled(device):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(device)).eps)
    return eps
