"""The rank of each layer from a size: the same everywhere, or wherever a rank takes away most."""

from collections.abc import Callable

import torch

from longshadow.compress.allocation import LayerGains, allocate
from longshadow.compress.blocks import HiddenStates, layer_shape, linear_layers, run_block
from longshadow.compress.criterion import Criterion
from longshadow.compress.matching import Stage
from longshadow.compress.measure import Calibrator
from longshadow.compress.shards import Shards

RANK_MULTIPLE = 8
# Gains are sums over many directions, and settle with fewer tokens than the directions do.
GAIN_SAMPLES = 16


def uniform_rank(stages: list[Stage], budget: int) -> int:
    """The largest rank, of whole eights, that all layers can have."""
    layers = [layer for stage in stages for layer in linear_layers(stage.quantized).values()]
    cost = sum(sum(layer_shape(layer)) for layer in layers)
    rank = budget // cost // RANK_MULTIPLE * RANK_MULTIPLE
    if rank == 0:
        raise ValueError(
            f"a budget of {budget} weights is too small: rank {RANK_MULTIPLE} for every layer needs "
            f"{RANK_MULTIPLE * cost}"
        )
    return rank


def spread_ranks(
    stages: list[Stage],
    calibrator: Calibrator,
    hidden: HiddenStates,
    sensitivity: dict[str, torch.Tensor],
    budget: int,
    *,
    shards: Shards | None,
    on_stage: Callable[[], None],
) -> dict[str, int]:
    """Ranks whose weights number at most `budget`, by the names of the layers in the model.

    Gains are measured on the first of the samples, without compensation of the blocks before. `shards` keeps those of
    finished blocks, and `on_stage` is called after each.

    Raises ValueError where not even one layer gets a rank.
    """
    gains = _gains(stages, calibrator, hidden, sensitivity, shards, on_stage)
    return allocate(gains, budget, multiple=RANK_MULTIPLE)


def _gains(
    stages: list[Stage],
    calibrator: Calibrator,
    hidden: HiddenStates,
    sensitivity: dict[str, torch.Tensor],
    shards: Shards | None,
    done: Callable[[], None],
) -> dict[str, LayerGains]:
    gains = {}
    hidden = hidden.first(GAIN_SAMPLES)
    for stage in stages:
        saved = None if shards is None else shards.load(f"gains_{stage.number:05d}")
        if saved is None:
            measured = calibrator.measure(stage.original, stage.quantized, hidden, stage.name)
            weights = of_stage(sensitivity, stage)
            tensors = {name: layer.gains(calibrator.criterion, weights.get(name)) for name, layer in measured.items()}
            facts = {name: layer.output_energy for name, layer in measured.items()}
            if shards is not None:
                shards.save(f"gains_{stage.number:05d}", tensors, facts)
        else:
            tensors, facts = saved
        layers = linear_layers(stage.quantized)
        for name, energy in facts.items():
            gains[stage.names[name]] = LayerGains(
                gains=tensors[name],
                cost=sum(layer_shape(layers[name])),
                weight=layer_weight(calibrator.criterion, energy),
            )
        if stage is not stages[-1]:
            hidden = run_block(stage.original if calibrator.of_original else stage.quantized, hidden)
        done()
    return gains


def layer_weight(criterion: Criterion, output_energy: float) -> float:
    """Of a layer's error among the layers'."""
    if criterion.method == "fisher":
        return 1.0  # the loss's own gradients have weighed it
    return 1 / output_energy if output_energy else 0.0


def of_stage(sensitivity: dict[str, torch.Tensor], stage: Stage) -> dict[str, torch.Tensor]:
    """Of the layers of a stage, by their names in it."""
    return {name: sensitivity[whole] for name, whole in stage.names.items() if whole in sensitivity}
