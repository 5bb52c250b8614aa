"""Compensations of one quantised model by every method and rank, from one and the same set of moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from longshadow.compress.allocation import LayerGains, allocate
from longshadow.compress.blocks import first_inputs, run_block
from longshadow.compress.criterion import Criterion
from longshadow.compress.matching import block_weights, stages_of
from longshadow.compress.measure import MeasuredLayer
from longshadow.compress.pipeline import SENSITIVITY_SAMPLES, SHRINKAGE
from longshadow.compress.ranks import RANK_MULTIPLE, layer_weight
from longshadow.compress.sensitivity import output_sensitivity
from longshadow.compress.solver import Factors, Spectrum, factors_along
from longshadow.compress.statistics import InputMoments

EORA, PUBLISHED, FISHER = "EoRA", "EoRA as published", "Fisher"
EORA_SPREAD, FISHER_SPREAD = "EoRA, ranks spread", "Fisher, ranks spread"
DIAGONAL, SVD, GPTQMODEL = "diagonal", "SVD", "as in GPTQModel"


@dataclass(frozen=True)
class Way:
    """A criterion, and whether ranks are spread over the layers."""

    criterion: Criterion
    spread: bool = False


WAYS = {
    EORA: Way(Criterion(shrinkage=SHRINKAGE)),
    EORA_SPREAD: Way(Criterion(shrinkage=SHRINKAGE), spread=True),
    FISHER: Way(Criterion(method="fisher", shrinkage=SHRINKAGE)),
    FISHER_SPREAD: Way(Criterion(method="fisher", shrinkage=SHRINKAGE), spread=True),
    PUBLISHED: Way(Criterion()),
    DIAGONAL: Way(Criterion(method="diagonal")),
    SVD: Way(Criterion(method="svd")),
}
# What `longshadow compensate` does unless told otherwise, and what it must not be worse than.
DEFAULT = FISHER_SPREAD
BASELINES = (PUBLISHED, DIAGONAL, SVD, GPTQMODEL)
METHODS = (*WAYS, GPTQMODEL)

Candidate = dict[str, Factors]


class RecentMoments:
    """x xᵀ as GPTQModel counts it: in fp32, and each sample pushes those before it back by N / (N + 1)."""

    def __init__(self, width: int, num_samples: int) -> None:
        self.matrix = torch.zeros(width, width)
        self._decay = num_samples / (num_samples + 1)

    def add(self, inputs: torch.Tensor) -> None:
        """Takes in the tokens of one sample."""
        tokens = inputs.flatten(0, -2).float()
        self.matrix.mul_(self._decay).add_(tokens.T @ tokens / len(tokens))


@dataclass(kw_only=True)
class Measured:
    """All layers of a model with their moments, counted both ways."""

    layers: dict[str, MeasuredLayer] = field(default_factory=dict)
    recent: dict[str, RecentMoments] = field(default_factory=dict)
    sensitivity: dict[str, torch.Tensor] = field(default_factory=dict)


@torch.no_grad()
def measure(original: nn.Module, quantized: nn.Module, samples: torch.Tensor) -> Measured:
    """On the inputs that the quantised model's own blocks give, which is one measurement for all candidates."""
    measured = Measured()
    hidden = first_inputs(quantized, samples)
    for stage in stages_of(original, quantized, head=False):
        weights = block_weights(stage.original, stage.quantized, hidden, stage.name)
        widths = {group[0]: weights.original[group[0]].shape[1] for group in weights.groups}
        plain = {first: InputMoments(width) for first, width in widths.items()}
        recent = {first: RecentMoments(width, len(samples)) for first, width in widths.items()}

        def count(name: str, module: nn.Module, inputs: torch.Tensor, plain=plain, recent=recent) -> None:  # type: ignore[no-untyped-def]
            if name in plain:
                plain[name].add(inputs)
                recent[name].add(inputs)

        hidden = run_block(stage.quantized, hidden, count)
        residuals = weights.residuals()
        for group in weights.groups:
            moments = plain[group[0]]
            for name in group:
                weight = weights.original[name]
                energy = float(((weight.double() @ moments.matrix) * weight).sum())
                measured.layers[stage.names[name]] = MeasuredLayer(
                    weight=weight, residual=residuals[name], moments=moments, output_energy=energy
                )
                measured.recent[stage.names[name]] = recent[group[0]]
    measured.sensitivity = output_sensitivity(original, samples[:SENSITIVITY_SAMPLES])
    return measured


def candidates(measured: Measured, method: str, ranks: tuple[int, ...], dtype: torch.dtype) -> Mapping[int, Candidate]:
    """The compensations of one method, by their rank; with ranks spread, those of as many weights as that rank's."""
    found: dict[int, Candidate] = {rank: {} for rank in ranks}
    if method == GPTQMODEL:
        for name, layer in measured.layers.items():
            b, a = gptqmodel_factors(layer.residual, measured.recent[name].matrix)
            for rank in ranks:
                found[rank][name] = Factors(lora_b=b[:, :rank].to(dtype), lora_a=a[:rank].to(dtype))
        return found
    way = WAYS[method]
    spectra = {
        name: layer.spectrum(way.criterion, measured.sensitivity[name]) for name, layer in measured.layers.items()
    }
    chosen = {rank: _ranks(measured, way, spectra, rank) for rank in ranks}
    for name, layer in measured.layers.items():
        objective = way.criterion.objective(layer.residual, layer.moments, measured.sensitivity[name])
        for rank in ranks:
            if chosen[rank][name]:
                directions = spectra[name].directions[:, : chosen[rank][name]]
                found[rank][name] = factors_along(objective, directions, layer.residual, dtype)
    return found


def _ranks(measured: Measured, way: Way, spectra: Mapping[str, Spectrum], rank: int) -> dict[str, int]:
    if not way.spread:
        return dict.fromkeys(spectra, rank)
    gains = {
        name: LayerGains(
            gains=spectra[name].gains,
            cost=sum(layer.residual.shape),
            weight=layer_weight(way.criterion, layer.output_energy),
        )
        for name, layer in measured.layers.items()
    }
    return allocate(gains, rank * sum(layer.cost for layer in gains.values()), multiple=RANK_MULTIPLE)


def gptqmodel_factors(residual: torch.Tensor, moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B [m, k] and A [k, n] by the formula that GPTQModel 7.7 follows, for all ranks at once.

    C = Q L Qᵀ in fp64; eigenvalues up to n eps32 max(L) are dropped; R Q L^½ = U S Vᵀ in fp32; B = U S^½ and
    A = S^½ Vᵀ L^-½ Qᵀ.
    """
    values, vectors = torch.linalg.eigh(moments.double())
    kept = values > len(values) * torch.finfo(torch.float32).eps * values.max()
    roots, basis = values[kept].sqrt(), vectors[:, kept]
    left, scales, right = torch.linalg.svd(residual.float() @ (basis * roots).float(), full_matrices=False)
    return left * scales.sqrt(), scales.sqrt().unsqueeze(1) * (right @ (basis / roots).T.float())
