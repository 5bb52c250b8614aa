"""One block: what quantisation took from its layers, and what their inputs say of it."""

import logging
from dataclasses import dataclass

import torch
from torch import nn

from longshadow.compress.blocks import HiddenStates, run_block
from longshadow.compress.criterion import AS_PUBLISHED, Criterion
from longshadow.compress.matching import block_weights
from longshadow.compress.solver import Factors, Spectrum, error_left, gains_of, refit_b, solve, spectrum_of
from longshadow.compress.statistics import (
    ErrorMoments,
    InputMoments,
    Moments,
    RefitMoments,
    input_moments_are_cheaper,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerReport:
    """One layer: its rank, and its error E ||R x||^2 relative to the output E ||W x||^2 it spoils, before and after."""

    rank: int
    before: float
    after: float


@dataclass(eq=False, kw_only=True)
class MeasuredLayer:
    """A layer that quantisation changed, with what was seen of its inputs.

    Attributes:
        weight, residual: W and R = W - W_quantised, [m, n] in fp32; W at the scales of the quantised weight.
        moments: of the inputs or of the errors.
        input_scale: what the watched inputs are divided by to be those of the quantised layer, [n], if not 1.
        output_energy: E ||W x||^2.
    """

    weight: torch.Tensor
    residual: torch.Tensor
    moments: Moments
    input_scale: torch.Tensor | None = None
    output_energy: float = 0.0

    def inputs(self, watched: torch.Tensor) -> torch.Tensor:
        """What the quantised layer is given where the watched one is given this."""
        return watched if self.input_scale is None else watched / self.input_scale

    def spectrum(self, criterion: Criterion, output_weights: torch.Tensor | None) -> Spectrum:
        """Of its error, as the criterion weighs it."""
        objective = criterion.objective(self.residual, self.moments, output_weights)
        return spectrum_of(objective.target, objective.moments)

    def gains(self, criterion: Criterion, output_weights: torch.Tensor | None) -> torch.Tensor:
        """Those of the spectrum alone, [k], which take a fraction of its time."""
        objective = criterion.objective(self.residual, self.moments, output_weights)
        return gains_of(objective.target, objective.moments)

    def error(self) -> float:
        """E ||R x||^2."""
        if isinstance(self.moments, InputMoments):
            return _energy(self.residual, self.moments)
        return float(self.moments.error_gram(self.residual).trace())


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibrator:
    """Where a block's layers take their inputs from: the quantised model's own blocks, or the original's.

    Attributes:
        of_original: watch the original's block, run over the original's hidden states.
        criterion: what the factors are to make small.
    """

    of_original: bool = False
    criterion: Criterion = AS_PUBLISHED

    def measure(
        self, original: nn.Module, quantized: nn.Module, hidden: HiddenStates, name: str
    ) -> dict[str, MeasuredLayer]:
        """Runs a block over its inputs and counts the moments of every layer whose weight has changed.

        Raises ValueError for weights or inputs that are not finite, and for weights too far apart.
        """
        if not all(sample.isfinite().all() for sample in hidden.samples):
            raise ValueError(
                f"{name} is given inputs that are not finite: weights before it are damaged, or beyond their dtype"
            )
        weights = block_weights(original, quantized, hidden, name, of_original=self.of_original)
        residuals = weights.residuals()
        layers: dict[str, MeasuredLayer] = {}
        counting: set[str] = set()  # layers that fill moments: of a group that shares them, the first
        for group in weights.groups:
            members = [member for member in group if member in residuals]
            if not members:
                continue
            width, device = residuals[members[0]].shape[1], residuals[members[0]].device
            shared = InputMoments(width, device=device)
            cheaper = input_moments_are_cheaper(width, [len(residuals[it]) for it in members])
            counting.update(members[:1] if cheaper else members)
            for member in members:
                layers[member] = MeasuredLayer(
                    weight=weights.original[member],
                    residual=residuals[member],
                    moments=shared if cheaper else ErrorMoments(residuals[member]),
                    input_scale=weights.columns.get(member) if self.of_original else None,
                )
        if uncalled := sorted(residuals.keys() - layers.keys()):
            logger.warning(
                "%s.%s is left as it is%s: the model does not call it as a layer that multiplies by its weight",
                name,
                uncalled[0],
                f", and {len(uncalled) - 1} more in that block" if len(uncalled) > 1 else "",
            )
        energies = dict.fromkeys(layers, 0.0)

        def count(layer_name: str, module: nn.Module, inputs: torch.Tensor) -> None:
            if layer_name not in counting:
                return
            layer = layers[layer_name]
            inputs = layer.inputs(inputs)
            layer.moments.add(inputs)
            if isinstance(layer.moments, ErrorMoments):
                outputs = inputs.flatten(0, -2).float() @ layer.weight.T
                energies[layer_name] += float(outputs.double().square().sum())

        run_block(original if self.of_original else quantized, hidden, count)
        for layer_name, layer in layers.items():
            if isinstance(layer.moments, InputMoments):
                layer.output_energy = _energy(layer.weight, layer.moments)
            else:
                layer.output_energy = energies[layer_name] / layer.moments.num_tokens
        return layers

    def solve(
        self,
        measured: dict[str, MeasuredLayer],
        block: nn.Module,
        hidden: HiddenStates,
        ranks: dict[str, int],
        sensitivity: dict[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> dict[str, tuple[Factors | None, LayerReport]]:
        """Factors of all layers, none for rank 0, with each layer's plain error relative to its output.

        Layers whose errors alone were counted get their B after a second pass over `block`, the one that was watched.
        """
        factors: dict[str, Factors] = {}
        seen: dict[str, RefitMoments] = {}
        for name, layer in measured.items():
            if ranks[name] > 0:
                factors[name] = solve(
                    layer.residual,
                    layer.moments,
                    ranks[name],
                    criterion=self.criterion,
                    output_weights=sensitivity.get(name),
                    dtype=dtype,
                )
                if isinstance(layer.moments, InputMoments):
                    seen[name] = RefitMoments.of(layer.residual, factors[name].lora_a, layer.moments.matrix)
        second = {name: RefitMoments(measured[name].residual, factors[name].lora_a) for name in factors.keys() - seen}

        def count(name: str, module: nn.Module, inputs: torch.Tensor) -> None:
            if name in second:
                second[name].add(measured[name].inputs(inputs))

        if second:
            run_block(block, hidden, count)
        for name, moments in second.items():
            # Those of plain SVD are the best for any inputs, as far as rounding goes.
            if self.criterion.method != "svd":
                share, energies = self.criterion.share, measured[name].moments.energies
                factors[name] = refit_b(factors[name], moments.shrunk(share, energies))
        seen |= second
        solved = {}
        for name, layer in measured.items():
            error, energy, found = layer.error(), layer.output_energy or 1.0, factors.get(name)
            after = error if found is None else error_left(error, found, seen[name])
            report = LayerReport(rank=0 if found is None else found.rank, before=error / energy, after=after / energy)
            solved[name] = (found, report)
        return solved


def _energy(weight: torch.Tensor, moments: InputMoments) -> float:
    """E ||W x||^2 from C, with products in fp32."""
    return float(((weight @ moments.matrix.float()) * weight).double().sum())
