"""`compensate`: a quantised model's error, block by block, as low-rank factors for its linear layers."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import torch
from torch import nn

from longshadow.compress.blocks import (
    HiddenStates,
    compensated,
    first_inputs,
    linear_layers,
    run_block,
)
from longshadow.compress.criterion import Criterion, Method
from longshadow.compress.experts import LeftOut, left_out
from longshadow.compress.matching import Stage, stages_of
from longshadow.compress.measure import Calibrator, LayerReport, MeasuredLayer
from longshadow.compress.provenance import FARTHER, times_the_rounding
from longshadow.compress.ranks import of_stage, spread_ranks, uniform_rank
from longshadow.compress.sensitivity import output_sensitivity
from longshadow.compress.shards import Shards
from longshadow.compress.solver import Factors
from longshadow.linears import on_onednn

Propagate = Literal["sequential", "quantized", "original"]
# Over all quantisers and ranks of bench/tables/eora_quality.py, half-way leaves less than either end.
SHRINKAGE = 0.5
# Squared gradients settle with far fewer tokens than second moments of inputs do.
SENSITIVITY_SAMPLES = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class Compensation:
    """Factors by the names of the modules in the model, each layer's error before and after, and what is left out."""

    factors: dict[str, Factors] = field(default_factory=dict)
    layers: dict[str, LayerReport] = field(default_factory=dict)
    left_out: LeftOut | None = None

    @property
    def num_weights(self) -> int:
        """Of all factors."""
        return sum(factors.lora_a.numel() + factors.lora_b.numel() for factors in self.factors.values())

    @property
    def num_compensated_weights(self) -> int:
        """Of the layers that the factors are for."""
        return sum(len(factors.lora_b) * factors.lora_a.shape[1] for factors in self.factors.values())


@torch.no_grad()
def compensate(
    original: nn.Module,
    quantized: nn.Module,
    samples: torch.Tensor,
    *,
    rank: int | None = 32,
    budget: int | None = None,
    uniform: bool = False,
    method: Method = "fisher",
    shrinkage: float = SHRINKAGE,
    propagate: Propagate = "sequential",
    head: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    shards: Shards | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> Compensation:
    """EoRA for every linear layer of the decoder blocks whose weight quantisation changed.

    Args:
        original, quantized: models of one architecture; their blocks are compared by name.
        samples: token ids [samples, length] of calibration text, without padding.
        rank: of every layer, or None with a `budget`.
        budget: weights of all factors together, spread over layers by what they take away from each one's error, in
            ranks of whole eights; errors of "fisher" count as they are, others relative to the layer's output.
        uniform: give all layers the largest rank, of whole eights, that the budget allows.
        method, shrinkage: of the `Criterion`.
        propagate: what a block is given: "sequential", the outputs of compensated blocks before it, "quantized",
            those of uncompensated ones, or "original", those of the original's.
        head: compensate the language-model head, too.
        dtype: of the factors.
        shards: keeps finished blocks, and has those of an interrupted run with the same arguments.
        on_block: called with the number of finished blocks and of all, for progress.

    Raises ValueError for models that do not match, for a budget or rank out of range, and for weights that are not
    finite.
    """
    if (rank is None) == (budget is None):
        raise ValueError("give either a rank or a budget")
    if samples.dim() != 2 or samples.numel() == 0:
        raise ValueError(f"samples must be token ids [samples, length], got {list(samples.shape)}")
    stages = stages_of(original, quantized, head=head)
    experts = left_out(original, quantized)
    if experts is not None:
        logger.warning("%s", experts)
    criterion = Criterion(method=method, shrinkage=shrinkage)
    calibrator = Calibrator(of_original=propagate == "original", criterion=criterion)
    num_done, num_steps = 0, len(stages) * (1 if budget is None or uniform else 2)

    def done() -> None:
        nonlocal num_done
        num_done += 1
        if on_block is not None:
            on_block(num_done, num_steps)

    with on_onednn(original, quantized):
        start = first_inputs(original if propagate == "original" else quantized, samples)
        if budget is not None and uniform:
            rank = uniform_rank(stages, budget)
        sensitivity: dict[str, torch.Tensor] = {}
        if method == "fisher":
            sensitivity = output_sensitivity(original, samples[:SENSITIVITY_SAMPLES], head=head)
        ranks: dict[str, int] | None = None
        if rank is None:
            assert budget is not None
            ranks = spread_ranks(stages, calibrator, start, sensitivity, budget, shards=shards, on_stage=done)
        result = Compensation(left_out=experts)
        hidden = start
        for stage in stages:
            saved = None if shards is None else shards.load(f"block_{stage.number:05d}")
            if saved is None:
                measured = calibrator.measure(stage.original, stage.quantized, hidden, stage.name)
                if stage is stages[0]:
                    _warn_of_another_original(measured)
                wanted = {name: rank if ranks is None else ranks[stage.names[name]] for name in measured}
                solved = calibrator.solve(
                    measured,
                    stage.original if calibrator.of_original else stage.quantized,
                    hidden,
                    {name: it for name, it in wanted.items() if it is not None},
                    of_stage(sensitivity, stage),
                    dtype,
                )
                if shards is not None:
                    _save(shards, stage, solved)
            else:
                solved = _solved(*saved)
            for name, (factors, report) in solved.items():
                result.layers[stage.names[name]] = report
                if factors is not None:
                    result.factors[stage.names[name]] = factors
            if stage is not stages[-1]:
                hidden = _next_inputs(stage, hidden, propagate, {name: pair for name, (pair, _) in solved.items()})
            done()
        return result


def _warn_of_another_original(measured: dict[str, MeasuredLayer]) -> None:
    """Where most layers are farther from the original than their format explains."""
    times = [times_the_rounding(layer.weight, layer.residual) for layer in measured.values()]
    known = [it for it in times if it is not None]
    if known and median(known) > FARTHER:
        logger.warning(
            "the quantised weights are %.1f times as far from the original's as rounding to their format would take "
            "them: if they were made of another revision or a finetune, give that",
            median(known),
        )


def _next_inputs(
    stage: Stage, hidden: HiddenStates, propagate: Propagate, factors: dict[str, Factors | None]
) -> HiddenStates:
    if propagate == "original":
        return run_block(stage.original, hidden)
    like = hidden.samples[0]
    layers = linear_layers(stage.quantized)
    added = {
        name: (layers[name], pair.lora_b.to(like), pair.lora_a.to(like))
        for name, pair in factors.items()
        if pair is not None and propagate == "sequential"
    }
    with compensated(added):
        return run_block(stage.quantized, hidden)


def _save(shards: Shards, stage: Stage, solved: dict[str, tuple[Factors | None, LayerReport]]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, (factors, _) in solved.items():
        if factors is not None:
            tensors |= {f"{name}.lora_A": factors.lora_a, f"{name}.lora_B": factors.lora_b}
    shards.save(f"block_{stage.number:05d}", tensors, {name: vars(report) for name, (_, report) in solved.items()})


def _solved(
    tensors: dict[str, torch.Tensor], facts: dict[str, dict[str, float]]
) -> dict[str, tuple[Factors | None, LayerReport]]:
    solved: dict[str, tuple[Factors | None, LayerReport]] = {}
    for name, report in facts.items():
        found = f"{name}.lora_A" in tensors
        factors = Factors(lora_b=tensors[f"{name}.lora_B"], lora_a=tensors[f"{name}.lora_A"]) if found else None
        solved[name] = (
            factors,
            LayerReport(rank=int(report["rank"]), before=report["before"], after=report["after"]),
        )
    return solved
