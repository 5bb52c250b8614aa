"""A quantised model beside its original, before anything is calibrated: formats, residuals, their spectra, and what a
compensation would take."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from longshadow.compress.blocks import first_inputs, run_block
from longshadow.compress.experts import LeftOut, left_out
from longshadow.compress.formats import format_of
from longshadow.compress.matching import block_weights, stages_of
from longshadow.compress.options import CompensationOptions
from longshadow.compress.planning import Plan, expected_plans
from longshadow.models import load_model

RANKS = (16, 32, 64)
# Enough to see which layers share their inputs.
NUM_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class LayerInspection:
    """One linear layer.

    Attributes:
        format: what its weight is stored in.
        scaled: whether the quantiser moved scales of its inputs or outputs into other layers; taken back in what
            follows.
        residual: ||W - W_quantised|| / ||W||.
        captured: the share of ||W - W_quantised||^2 in as many leading singular directions, by rank.
    """

    format: str
    scaled: bool
    residual: float
    captured: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A quantised model.

    Attributes:
        layers: the linear layers in all blocks, by their names.
        left_out: weights that are in no linear layer.
        plans: what compensations of uniform ranks would take, with the other settings of `longshadow compensate` as
            they are unless told otherwise.
    """

    layers: dict[str, LayerInspection]
    left_out: LeftOut | None
    plans: dict[int, Plan]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layers": {name: vars(layer) for name, layer in self.layers.items()},
            "left_out": None if self.left_out is None else asdict(self.left_out),
            "compensation": {rank: plan.to_dict() for rank, plan in self.plans.items()},
        }


@torch.no_grad()
def inspect_quantized(
    original: str,
    quantized: str,
    *,
    device: str | None = None,
    max_memory: int | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> Inspection:
    """The weights alone are looked at; where activations live, a rank captures more.

    `max_memory` is in bytes, None for what is free; where it does not hold both models, the original stays on disk.
    `on_block` is called with the number of finished blocks and of all.

    Raises ValueError for models that cannot be loaded or do not match.
    """
    options = {rank: CompensationOptions(rank=rank, max_memory=max_memory) for rank in RANKS}
    plans = expected_plans(original, quantized, list(options.values()), device=device)
    limit = plans[0].estimate.original if plans[0].original_on_disk else None
    first = load_model(original, device=device, max_memory=limit).model
    second = load_model(quantized, device=device).model
    stages = stages_of(first, second, head=False)
    hidden = first_inputs(second, torch.arange(NUM_TOKENS, device=second.device).unsqueeze(0))
    found = {}
    for done, stage in enumerate(stages, 1):
        weights = block_weights(stage.original, stage.quantized, hidden, stage.name)
        for name, whole in stage.names.items():
            weight, residual = weights.original[name], weights.original[name] - weights.quantized[name]
            found[whole] = LayerInspection(
                format=format_of(stage.quantized.get_submodule(name)),
                scaled=name in weights.columns,
                residual=float(residual.norm() / weight.norm().clamp(min=1e-30)),
                captured=captured(residual),
            )
        hidden = run_block(stage.quantized, hidden)
        if on_block is not None:
            on_block(done, len(stages))
    return Inspection(layers=found, left_out=left_out(first, second), plans=dict(zip(options, plans, strict=True)))


def captured(residual: torch.Tensor) -> dict[int, float]:
    """The share of the squared norm in the leading singular directions of a residual [m, n], by rank."""
    residual = residual.double()
    gram = residual @ residual.T if len(residual) <= residual.shape[1] else residual.T @ residual
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    total = float(energies.sum())
    return {rank: float(energies[:rank].sum()) / total if total else 0.0 for rank in RANKS}


def print_inspection(inspection: Inspection) -> None:
    """On stdout: a row for each kind of layer, means over the blocks, and one for each rank of a compensation."""
    from rich.console import Console

    # Names may have brackets, which rich would take for markup.
    console = Console(markup=False, highlight=False)
    console.print(_table_of_layers(inspection.layers))
    if scaled := sum(layer.scaled for layer in inspection.layers.values()):
        console.print(f"{scaled} layers have scales folded into norms or other layers, which were taken back here")
    if inspection.left_out is not None:
        console.print(str(inspection.left_out), soft_wrap=True)
    console.print(_table_of_plans(inspection.plans))


def _table_of_layers(layers: Mapping[str, LayerInspection]) -> Any:
    from rich.table import Table

    ranks = [str(rank) for rank in RANKS]
    title = f"residual ‖W − Ŵ‖ / ‖W‖, and the share of its energy in rank {', '.join(ranks)}"
    table = Table("layers", "number", "format", "residual", "largest", *ranks, title=title, title_justify="left")
    kinds: dict[tuple[str, str], list[LayerInspection]] = {}
    for name, layer in layers.items():
        kinds.setdefault((name.rpartition(".")[2], layer.format), []).append(layer)
    for (kind, form), members in kinds.items():
        shares = [_mean([layer.captured[rank] for layer in members]) for rank in RANKS]
        residuals = [layer.residual for layer in members]
        numbers = (f"{_mean(residuals):.2%}", f"{max(residuals):.2%}", *(f"{share:.0%}" for share in shares))
        table.add_row(kind, str(len(members)), form, *numbers)
    return table


def _table_of_plans(plans: Mapping[int, Plan]) -> Any:
    from rich.table import Table

    table = Table("a compensation of rank", "adapter", "memory", "free", "time, roughly")
    for rank, plan in plans.items():
        table.add_row(
            str(rank),
            f"{plan.estimate.adapter / 1e6:,.1f} MB",
            f"{plan.estimate.memory / 1e9:,.2f} GB{', original on disk' if plan.original_on_disk else ''}",
            f"{plan.available / 1e9:,.2f} GB",
            f"{plan.estimate.minutes:,} min",
        )
    return table


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
