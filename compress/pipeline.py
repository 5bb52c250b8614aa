"""`compensate`: a quantised model's error, block by block, as low-rank factors for its linear layers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from longshadow.compress.allocation import LayerGains, allocate
from longshadow.compress.blocks import (
    HiddenStates,
    compensated,
    decoder_blocks,
    first_inputs,
    linear_layers,
    run_block,
)
from longshadow.compress.formats import weight_of
from longshadow.compress.solver import Factors, Method, Spectrum, error_left, solve, spectrum_of
from longshadow.compress.statistics import ErrorMoments, InputMoments, Moments, input_moments_are_cheaper

Propagate = Literal["sequential", "quantized"]
RANK_MULTIPLE = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerReport:
    """One layer: its rank, and its error E ||R x||^2 relative to the output E ||W x||^2 it spoils, before and after."""

    rank: int
    before: float
    after: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Compensation:
    """Factors by the names of the modules in the model, and what each layer's error was and is."""

    factors: dict[str, Factors] = field(default_factory=dict)
    layers: dict[str, LayerReport] = field(default_factory=dict)

    @property
    def num_weights(self) -> int:
        """Of all factors."""
        return sum(factors.lora_a.numel() + factors.lora_b.numel() for factors in self.factors.values())


@torch.no_grad()
def compensate(
    original: nn.Module,
    quantized: nn.Module,
    samples: torch.Tensor,
    *,
    rank: int | None = 32,
    budget: int | None = None,
    method: Method = "eora",
    propagate: Propagate = "sequential",
    dtype: torch.dtype = torch.bfloat16,
    on_block: Callable[[int, int], None] | None = None,
) -> Compensation:
    """EoRA for every linear layer of the decoder blocks whose weight quantisation changed.

    Args:
        original, quantized: models of one architecture; their blocks are compared by name.
        samples: token ids [samples, length] of calibration text, without padding.
        rank: of every layer, or None with a `budget`.
        budget: weights of all factors together, spread over layers by what they take away from each one's relative
            error, in ranks of whole eights.
        method: "eora", or to compare with "diagonal" or "svd".
        propagate: what a block is given: "sequential", the outputs of compensated blocks before it, or "quantized",
            those of uncompensated ones.
        dtype: of the factors.
        on_block: called with the number of finished blocks and of all, for progress.

    Raises ValueError for models that do not match, for a budget or rank out of range, and for weights that are not
    finite.
    """
    if (rank is None) == (budget is None):
        raise ValueError("give either a rank or a budget")
    if method not in ("eora", "diagonal", "svd"):
        raise ValueError(f"method must be eora, diagonal or svd, got {method!r}")
    blocks, compressed = decoder_blocks(original), decoder_blocks(quantized)
    if len(blocks) != len(compressed):
        raise ValueError(f"the models have {len(blocks)} and {len(compressed)} blocks: they do not match")
    if samples.dim() != 2 or samples.numel() == 0:
        raise ValueError(f"samples must be token ids [samples, length], got {list(samples.shape)}")
    prefix = _prefix_of(quantized, compressed)
    start = first_inputs(quantized, samples)
    ranks = None
    if budget is not None:
        gains = _gains(blocks, compressed, start, prefix)
        ranks = allocate(gains, budget, multiple=RANK_MULTIPLE)
    result = Compensation()
    hidden = start
    for number, (block, quantized_block) in enumerate(zip(blocks, compressed, strict=True)):
        name = f"{prefix}.{number}"
        measured = measure_block(block, quantized_block, hidden, name, only_inputs=method != "eora")
        chosen: dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]] = {}
        for layer_name, layer in measured.items():
            wanted = rank if ranks is None else ranks[f"{name}.{layer_name}"]
            assert wanted is not None
            factors, report = layer.solve(wanted, method, dtype)
            result.layers[f"{name}.{layer_name}"] = report
            if factors is not None:
                result.factors[f"{name}.{layer_name}"] = factors
                kind = layer.residual.dtype
                chosen[layer_name] = (layer.module, factors.lora_b.to(kind), factors.lora_a.to(kind))
        if number + 1 < len(blocks):
            with compensated(chosen if propagate == "sequential" else {}):
                hidden = run_block(quantized_block, hidden)
        if on_block is not None:
            on_block(number + 1, len(blocks))
    return result


@dataclass(eq=False, kw_only=True)
class MeasuredLayer:
    """A layer that quantisation changed, with what was seen of its inputs."""

    module: nn.Module
    residual: torch.Tensor
    moments: Moments
    output_energy: float = 0.0

    def spectrum(self) -> Spectrum:
        """Of its error."""
        return spectrum_of(self.residual, self.moments)

    def solve(self, rank: int, method: Method, dtype: torch.dtype) -> tuple[Factors | None, LayerReport]:
        """The factors of that rank, none for rank 0, and the error relative to the layer's output."""
        energy = self.output_energy or 1.0
        before = float(self.moments.error_gram(self.residual).trace()) / energy
        if rank == 0:
            return None, LayerReport(rank=0, before=before, after=before)
        factors = solve(self.residual, self.moments, rank, method=method, dtype=dtype)
        after = max(0.0, error_left(self.residual, self.moments, factors)) / energy
        return factors, LayerReport(rank=factors.rank, before=before, after=after)


def measure_block(
    block: nn.Module, quantized: nn.Module, hidden: HiddenStates, name: str, *, only_inputs: bool = False
) -> dict[str, MeasuredLayer]:
    """Runs a quantised block over its inputs and counts the moments of every layer whose weight has changed.

    Of its errors, where that is cheaper and not ruled out by `only_inputs`.
    """
    originals, changed = linear_layers(block), linear_layers(quantized)
    if originals.keys() != changed.keys():
        odd = sorted(originals.keys() ^ changed.keys())
        raise ValueError(f"the models do not match: {name}.{odd[0]} is in one of them only")
    weights: dict[str, torch.Tensor] = {}
    residuals: dict[str, torch.Tensor] = {}
    for layer_name, layer in changed.items():
        weight, approximation = weight_of(originals[layer_name]), weight_of(layer)
        if weight.shape != approximation.shape:
            raise ValueError(
                f"the models do not match: {name}.{layer_name} is {list(weight.shape)} in one and "
                f"{list(approximation.shape)} in the other"
            )
        if not (weight.isfinite().all() and approximation.isfinite().all()):
            raise ValueError(f"{name}.{layer_name} has weights that are not finite")
        if not torch.equal(weight, approximation):
            weights[layer_name], residuals[layer_name] = weight, weight - approximation
    layers: dict[str, MeasuredLayer] = {}
    counting: set[str] = set()  # layers that fill moments: of a group that shares them, the first
    for group in _input_groups(quantized, hidden, list(residuals)):
        width = residuals[group[0]].shape[1]
        shared = InputMoments(width, device=residuals[group[0]].device)
        cheaper = only_inputs or input_moments_are_cheaper(width, [len(residuals[member]) for member in group])
        counting.update(group[:1] if cheaper else group)
        for member in group:
            moments: Moments = shared if cheaper else ErrorMoments(residuals[member])
            layers[member] = MeasuredLayer(module=changed[member], residual=residuals[member], moments=moments)
    seen: dict[str, float] = dict.fromkeys(layers, 0.0)

    def count(layer_name: str, module: nn.Module, inputs: torch.Tensor) -> None:
        if layer_name in layers:
            outputs = inputs.flatten(0, -2).float() @ weights[layer_name].T
            seen[layer_name] += float(outputs.double().square().sum())
        if layer_name in counting:
            layers[layer_name].moments.add(inputs)

    run_block(quantized, hidden, count)
    for layer_name, measured in layers.items():
        measured.output_energy = seen[layer_name] / measured.moments.num_tokens
    return layers


def _input_groups(block: nn.Module, hidden: HiddenStates, names: list[str]) -> list[list[str]]:
    """Layers that are given one and the same tensor, found on the first sample."""
    given: dict[str, int] = {}
    kept: list[torch.Tensor] = []

    def note(name: str, module: nn.Module, inputs: torch.Tensor) -> None:
        kept.append(inputs)  # alive, so that no address is used twice
        given[name] = inputs.data_ptr()

    run_block(block, HiddenStates(samples=hidden.samples[:1], arguments=hidden.arguments), note)
    groups: dict[int, list[str]] = {}
    for name in names:
        if name in given:
            groups.setdefault(given[name], []).append(name)
    return list(groups.values())


def _gains(
    blocks: nn.ModuleList, compressed: nn.ModuleList, hidden: HiddenStates, prefix: str
) -> dict[str, LayerGains]:
    """Of all layers, over the uncompensated model; relative to each layer's output, so that large ones do not win."""
    gains = {}
    for number, (block, quantized) in enumerate(zip(blocks, compressed, strict=True)):
        for name, layer in measure_block(block, quantized, hidden, f"{prefix}.{number}").items():
            gains[f"{prefix}.{number}.{name}"] = LayerGains(
                gains=layer.spectrum().gains,
                cost=sum(layer.residual.shape),
                weight=1 / layer.output_energy if layer.output_energy else 0.0,
            )
        hidden = run_block(quantized, hidden)
    return gains


def _prefix_of(model: nn.Module, blocks: nn.ModuleList) -> str:
    """The name of the list of blocks in the model."""
    return next(str(name) for name, module in model.named_modules() if module is blocks)
