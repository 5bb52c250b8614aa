"""Compensations of one quantised model by every method and rank, from one and the same set of moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from longshadow.compress.allocation import LayerGains, allocate
from longshadow.compress.blocks import first_inputs, run_block
from longshadow.compress.matching import stages_of
from longshadow.compress.measure import Calibrator, MeasuredLayer
from longshadow.compress.pipeline import RANK_MULTIPLE, SENSITIVITY_SAMPLES
from longshadow.compress.sensitivity import output_sensitivity
from longshadow.compress.solver import Factors, cast_factors, factors_of, solve, spectrum_of, weighted
from longshadow.compress.statistics import InputMoments

EORA, SPREAD, FISHER = "EoRA", "EoRA, ranks spread", "Fisher"
DIAGONAL, SVD, GPTQMODEL = "diagonal", "SVD", "as in GPTQModel"
METHODS = (EORA, SPREAD, DIAGONAL, SVD, FISHER, GPTQMODEL)

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
    calibrator = Calibrator(only_inputs=True)
    hidden = first_inputs(quantized, samples)
    for stage in stages_of(original, quantized, head=False):
        layers = calibrator.measure(stage.original, stage.quantized, hidden, stage.name)
        recent = {id(layer.moments): RecentMoments(layer.residual.shape[1], len(samples)) for layer in layers.values()}
        first = {id(layer.moments): name for name, layer in reversed(layers.items())}

        def count(name: str, module: nn.Module, inputs: torch.Tensor, first=first, recent=recent) -> None:  # type: ignore[no-untyped-def]
            for key, member in first.items():
                if member == name:
                    recent[key].add(inputs)

        hidden = run_block(stage.quantized, hidden, count)
        for name, layer in layers.items():
            measured.layers[stage.names[name]] = layer
            measured.recent[stage.names[name]] = recent[id(layer.moments)]
    measured.sensitivity = output_sensitivity(original, list(measured.layers), samples[:SENSITIVITY_SAMPLES])
    return measured


def candidates(measured: Measured, method: str, ranks: tuple[int, ...], dtype: torch.dtype) -> Mapping[int, Candidate]:
    """The compensations of one method, by their rank; with ranks spread, those of as many weights as that rank's."""
    if method == SPREAD:
        return _spread(measured, ranks, dtype)
    found: dict[int, Candidate] = {rank: {} for rank in ranks}
    for name, layer in measured.layers.items():
        assert isinstance(layer.moments, InputMoments)
        if method == GPTQMODEL:
            b, a = gptqmodel_factors(layer.residual, measured.recent[name].matrix)
            for rank in ranks:
                found[rank][name] = Factors(lora_b=b[:, :rank].to(dtype), lora_a=a[:rank].to(dtype))
        elif method == FISHER:
            for rank in ranks:
                weights = measured.sensitivity[name]
                found[rank][name] = solve(
                    layer.residual, layer.moments, rank, method="fisher", output_weights=weights, dtype=dtype
                )
        else:
            kind = {EORA: "eora", DIAGONAL: "diagonal", SVD: "svd"}[method]
            moments = InputMoments.of(weighted(kind, layer.moments.matrix))  # type: ignore[arg-type]
            spectrum = spectrum_of(layer.residual, moments)
            for rank in ranks:
                factors = factors_of(layer.residual, spectrum.directions[:, :rank])
                found[rank][name] = cast_factors(factors, layer.residual, moments, dtype)
    return found


def _spread(measured: Measured, ranks: tuple[int, ...], dtype: torch.dtype) -> Mapping[int, Candidate]:
    spectra = {name: layer.spectrum() for name, layer in measured.layers.items()}
    gains = {
        name: LayerGains(gains=spectra[name].gains, cost=sum(layer.residual.shape), weight=1 / layer.output_energy)
        for name, layer in measured.layers.items()
    }
    found: dict[int, Candidate] = {}
    for rank in ranks:
        budget = rank * sum(layer.cost for layer in gains.values())
        chosen = allocate(gains, budget, multiple=RANK_MULTIPLE)
        found[rank] = {
            name: cast_factors(
                factors_of(layer.residual, spectra[name].directions[:, : chosen[name]]),
                layer.residual,
                layer.moments,
                dtype,
            )
            for name, layer in measured.layers.items()
            if chosen[name]
        }
    return found


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
