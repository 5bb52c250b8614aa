"""Both models side by side: their blocks, weights of one at the same scales, and which layers share their inputs.

Legend: m outputs of a layer, n inputs.
"""

from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from torch import nn

from longshadow.compress.blocks import Head, HiddenStates, decoder_blocks, input_groups, layer_shape, linear_layers
from longshadow.compress.folding import norm_scale, unfolded
from longshadow.compress.formats import weight_of


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A block, or the head, in both models; `names` are the whole names of its linear layers."""

    number: int
    original: nn.Module
    quantized: nn.Module
    name: str
    names: dict[str, str]


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockWeights:
    """Of the linear layers of a block, by their names in it.

    Attributes:
        original: W [m, n] in fp32, at the scales of the quantised weights.
        quantized: [m, n] in fp32.
        columns: what the original's columns were multiplied by, [n], where the quantiser had folded scales.
        groups: layers that are given one and the same input.
    """

    original: dict[str, torch.Tensor]
    quantized: dict[str, torch.Tensor]
    columns: dict[str, torch.Tensor]
    groups: list[list[str]]

    def residuals(self) -> dict[str, torch.Tensor]:
        """R = W - W_quantised of the layers that quantisation changed."""
        return {
            name: weight - self.quantized[name]
            for name, weight in self.original.items()
            if not torch.equal(weight, self.quantized[name])
        }


def stages_of(original: nn.Module, quantized: nn.Module, *, head: bool) -> list[Stage]:
    """Blocks of both models side by side, and their heads.

    Raises ValueError where their numbers differ, or the names or shapes of their linear layers do.
    """
    blocks, compressed = decoder_blocks(original), decoder_blocks(quantized)
    if len(blocks) != len(compressed):
        raise ValueError(f"the models have {len(blocks)} and {len(compressed)} blocks: they do not match")
    pairs: list[tuple[nn.Module, nn.Module]] = list(zip(blocks, compressed, strict=True))
    if head:
        pairs.append((Head(original), Head(quantized)))
    whole = {module: name for name, module in quantized.named_modules()}
    stages = []
    for number, (block, other) in enumerate(pairs):
        name = whole.get(other, "the head")
        _check_layers(block, other, name)
        names = {below: whole[layer] for below, layer in linear_layers(other).items()}
        stages.append(Stage(number=number, original=block, quantized=other, name=name, names=names))
    return stages


def head_is_changed(original: nn.Module, quantized: nn.Module) -> bool:
    """Whether quantisation changed the head's weight; many quantisers leave it as it is.

    Raises ValueError for a model whose head cannot be compensated.
    """
    given, changed = Head(original).head, Head(quantized).head
    with align_module_device(given):
        return not torch.equal(weight_of(given), weight_of(changed))


def _check_layers(block: nn.Module, other: nn.Module, name: str) -> None:
    given, changed = (
        {below: layer_shape(layer) for below, layer in linear_layers(it).items()} for it in (block, other)
    )
    if odd := sorted(given.keys() ^ changed.keys()):
        raise ValueError(f"the models do not match: {name}.{odd[0]} is in one of them only")
    for below, shape in given.items():
        if changed[below] != shape:
            raise ValueError(
                f"the models do not match: {name}.{below} is {list(shape)} in one and {list(changed[below])} in the "
                "other"
            )


def block_weights(
    original: nn.Module, quantized: nn.Module, hidden: HiddenStates, name: str, *, of_original: bool = False
) -> BlockWeights:
    """Reads a block of two models whose layers have the same names and shapes.

    Args:
        hidden: inputs of the block, of which the first sample is run to see what layers are given.
        name: of the block, for messages.
        of_original: run the original's block rather than the quantised one.

    Raises ValueError for weights that are not finite, cannot be read, or are too far apart.
    """
    given, changed = linear_layers(original), linear_layers(quantized)
    weights, approximations = {}, {}
    for layer_name, layer in changed.items():
        with align_module_device(given[layer_name]):  # an original that does not fit in memory lies on disk
            weights[layer_name] = weight_of(given[layer_name])
        approximations[layer_name] = weight_of(layer)
        if not (weights[layer_name].isfinite().all() and approximations[layer_name].isfinite().all()):
            raise ValueError(
                f"{name}.{layer_name} has weights that are not finite: get the model's files again, or quantise it anew"
            )
    scales: dict[str, torch.Tensor] = {}
    groups = input_groups(original if of_original else quantized, hidden)
    for group in groups:
        if group.norm is not None:
            name_of_norm = group.norm.name
            norms = original.get_submodule(name_of_norm), quantized.get_submodule(name_of_norm)
            with align_module_device(norms[0]):
                scale = norm_scale(*norms, group.norm.call, weights[group.layers[0]].shape[1])
            if scale is not None:
                scales |= dict.fromkeys(group.layers, scale)
    weights, columns = unfolded(weights, approximations, scales)
    return BlockWeights(
        original=weights,
        quantized=approximations,
        columns=columns,
        groups=[list(group.layers) for group in groups],
    )
