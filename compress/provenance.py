"""Tells a quantised model of this original from one of another revision, a finetune, or another seed.

What quantisers leave alone must be the same, and what they round must lie near: a weight is on a grid, whose points
show in groups of inputs, and rounding to the nearest leaves what it leaves. Quantisers that round otherwise, as GPTQ
does, go farther, but not much.

Legend: m outputs of a layer, n inputs; g inputs of a group.
"""

import torch
from accelerate.utils import align_module_device
from torch import nn

from longshadow.compress.blocks import decoder_blocks
from longshadow.compress.storage import is_plain

# Of the norm: what rounding to sixteen bits may do, and what rounding an embedding to a few may, as GGUF files do.
ROUNDED, QUANTIZED = 2e-3, 0.25
# How much farther than to the nearest point of its grid a quantiser takes a weight; GPTQ does by a tenth.
FARTHER = 1.5
GROUPS = (16, 32, 64, 128, 256)
NUM_ROWS = 64
# Points in a group that make a grid, per input, and fewer of them by which a larger group is the better guess.
MOST_POINTS, CLEARLY = 0.5, 0.9
# Of the norm of a weight: what rounding leaves where no grid shows, as in eight bits, at most that of four in groups of
# sixteen.
FINE = 0.07
MANY_ZEROS = 0.2


@torch.no_grad()
def changed_beside_layers(original: nn.Module, quantized: nn.Module, *, packed: bool = False) -> str | None:
    """A parameter outside the blocks that is another one, with by how much; None where there is none.

    Inside, scales may have been folded into norms. Linear layers are left out, since they may be quantised, such as the
    head; `packed` says that embeddings were, too.
    """
    inside = {id(parameter) for block in decoder_blocks(original) for parameter in block.parameters()}
    others = dict(quantized.named_parameters())
    for prefix, module in original.named_modules():
        if isinstance(getattr(module, "in_features", None), int):
            continue
        for name, _ in module.named_parameters(recurse=False):
            whole = f"{prefix}.{name}" if prefix else name
            with align_module_device(module):
                mine, other = module.get_parameter(name), others.get(whole)
                if id(mine) in inside or other is None or other.shape != mine.shape or not is_plain(other):
                    continue
                distance = _relative_distance(mine, other)
            if distance > (QUANTIZED if packed and mine.dim() > 1 else ROUNDED):
                return f"{whole} is {distance:.1%} apart"
    return None


@torch.no_grad()
def times_the_rounding(weight: torch.Tensor, residual: torch.Tensor) -> float | None:
    """||R|| over what rounding W [m, n] to the nearest point of the quantised weight's grid would leave.

    About 1 for rounding to nearest; None after pruning, which rounds to no grid, and where nothing would be left.
    """
    weight, residual = weight[:NUM_ROWS], residual[:NUM_ROWS]
    rounded = weight - residual
    # In groups smaller than the quantiser's not all points are seen, and in larger ones several grids are.
    group, share = 0, MOST_POINTS
    for size in (*GROUPS, weight.shape[1]):
        if weight.shape[1] % size == 0 and (seen := _points_seen(rounded.reshape(-1, size))) < CLEARLY * share:
            group, share = size, seen
    if not group:
        is_pruned = float((rounded == 0).float().mean()) > MANY_ZEROS
        return None if is_pruned else float(residual.norm() / weight.norm().clamp(min=1e-30)) / FINE
    values, points = weight.reshape(-1, group), rounded.reshape(-1, group).sort(1).values
    left = float((values - _nearest(values, points)).norm())
    return float(residual.norm()) / left if left > 0 else None


def _points_seen(values: torch.Tensor) -> float:
    """Different values in a group, per input; values [groups, g]."""
    # Sums and products of rounded numbers differ in the last digits.
    gaps = values.sort(1).values.diff(dim=1) > 1e-5 * values.abs().amax(1, keepdim=True)
    return (float(gaps.sum(1).float().mean()) + 1) / values.shape[1]


def _nearest(values: torch.Tensor, ordered: torch.Tensor) -> torch.Tensor:
    """For each value the nearest of the points [groups, g], which are in order."""
    above = torch.searchsorted(ordered.contiguous(), values.contiguous()).clamp(max=ordered.shape[1] - 1)
    high, low = ordered.gather(1, above), ordered.gather(1, (above - 1).clamp(min=0))
    return torch.where((values - low).abs() < (high - values).abs(), low, high)


def _relative_distance(mine: torch.Tensor, other: torch.Tensor) -> float:
    """In pieces, since embeddings are large."""
    total = squares = 0.0
    for one, two in zip(mine.split(4096), other.split(4096), strict=True):
        total += float((one.float() - two.to(one.device).float()).square().sum())
        squares += float(one.float().square().sum())
    return (total / squares) ** 0.5 if squares else float(total > 0)
