"""A quantised model beside its original, before anything is calibrated: formats, residuals, and their spectra."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device

from longshadow.compress.formats import format_of, weight_of
from longshadow.compress.matching import stages_of
from longshadow.models import load_model

RANKS = (16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class LayerInspection:
    """One linear layer.

    Attributes:
        format: what its weight is stored in.
        residual: ||W - W_quantised|| / ||W||.
        captured: the share of ||W - W_quantised||^2 in as many leading singular directions, by rank.
    """

    format: str
    residual: float
    captured: dict[int, float]


def inspect_quantized(original: str, quantized: str, *, device: str | None = None) -> dict[str, LayerInspection]:
    """Of the linear layers in all blocks, by their names.

    The weights alone are looked at; where activations live, a rank captures more.

    Raises ValueError for models that cannot be loaded or do not match.
    """
    first, second = load_model(original, device=device), load_model(quantized, device=device)
    found = {}
    for stage in stages_of(first.model, second.model, head=False):
        for name, whole in stage.names.items():
            layer = stage.original.get_submodule(name)
            with align_module_device(layer):
                weight = weight_of(layer)
            other = stage.quantized.get_submodule(name)
            approximation = weight_of(other)
            if weight.shape != approximation.shape:
                raise ValueError(
                    f"the models do not match: {whole} is {list(weight.shape)} in one and "
                    f"{list(approximation.shape)} in the other"
                )
            found[whole] = LayerInspection(
                format=format_of(other),
                residual=float((weight - approximation).norm() / weight.norm()),
                captured=captured(weight - approximation),
            )
    return found


def captured(residual: torch.Tensor) -> dict[int, float]:
    """The share of the squared norm in the leading singular directions of a residual [m, n], by rank."""
    residual = residual.double()
    gram = residual @ residual.T if len(residual) <= residual.shape[1] else residual.T @ residual
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    total = float(energies.sum())
    return {rank: float(energies[:rank].sum()) / total if total else 0.0 for rank in RANKS}


def print_inspection(layers: dict[str, LayerInspection]) -> None:
    """On stdout: a row for each kind of layer, means over the blocks."""
    from rich.console import Console
    from rich.table import Table

    table = Table("layers", "number", "format", "residual", *(f"in rank {rank}" for rank in RANKS))
    kinds: dict[tuple[str, str], list[LayerInspection]] = {}
    for name, layer in layers.items():
        kinds.setdefault((name.rpartition(".")[2], layer.format), []).append(layer)
    for (kind, form), members in kinds.items():
        shares = [_mean([layer.captured[rank] for layer in members]) for rank in RANKS]
        residual = _mean([layer.residual for layer in members])
        table.add_row(kind, str(len(members)), form, f"{residual:.2%}", *(f"{share:.0%}" for share in shares))
    Console().print(table)


def to_dict(layers: dict[str, LayerInspection]) -> dict[str, Any]:
    """For JSON."""
    return {name: vars(layer) for name, layer in layers.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
