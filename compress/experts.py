"""What compensation leaves out: experts of a mixture, which transformers keeps as one parameter for all of them.

Such a parameter is no linear layer. Of the runtimes, PEFT alone could adapt it (`target_parameters`).
"""

from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.nn.modules.conv import _ConvNd

from longshadow.compress.blocks import decoder_blocks
from longshadow.compress.storage import is_plain, stored_bytes
from longshadow.report import format_bytes


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Experts that quantisation changed.

    Attributes:
        example: the name of one of the parameters.
        num_weights: of all of them.
        share: of all weights in the original's blocks.
        num_bytes: that they take in the quantised model.
    """

    example: str
    num_weights: int
    share: float
    num_bytes: int

    def __str__(self) -> str:
        return (
            f"experts are not compensated, since they are parameters and no linear layers (such as {self.example}): "
            f"their {self.num_weights:,} weights are {self.share:.1%} of those in the blocks, and take "
            f"{format_bytes(self.num_bytes)} of the quantised model"
        )


@torch.no_grad()
def left_out(original: nn.Module, quantized: nn.Module) -> LeftOut | None:
    """None where there are no experts, or quantisation has left them as they were."""
    names, num_weights, num_bytes = [], 0, 0
    modules = dict(quantized.named_modules())
    for prefix, module in original.named_modules():
        if isinstance(module, _ConvNd):
            continue
        given = dict(module.named_parameters(recurse=False))
        for name, parameter in given.items():
            if parameter.dim() < 3:
                continue
            # Scales have names that begin alike, and biases as well, which the original has, too.
            stored = [
                value
                for key, value in (modules[prefix].named_parameters(recurse=False) if prefix in modules else ())
                if key == name or (key.startswith(name) and key not in given)
            ]
            with align_module_device(module):
                if _is_unchanged(module.get_parameter(name), stored):
                    continue
            names.append(f"{prefix}.{name}")
            num_weights += parameter.numel()
            num_bytes += sum(map(stored_bytes, stored))
    if not names:
        return None
    total = sum(parameter.numel() for parameter in decoder_blocks(original).parameters())
    return LeftOut(example=names[0], num_weights=num_weights, share=num_weights / total, num_bytes=num_bytes)


def _is_unchanged(parameter: torch.Tensor, stored: list[torch.Tensor]) -> bool:
    if [weight.shape for weight in stored] != [parameter.shape] or not is_plain(stored[0]):
        return False
    # The original may be in a wider dtype than the quantised model. One expert at a time, since all are large.
    pairs = zip(parameter, stored[0], strict=True)
    return stored[0].dtype.itemsize > 1 and all(torch.equal(mine.to(other), other) for mine, other in pairs)
