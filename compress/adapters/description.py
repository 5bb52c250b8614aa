"""What an adapter folder is, in numbers: `longshadow adapter inspect`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longshadow.compress.adapters.reading import Adapter, AdapterLayer
from longshadow.compress.report import REPORT


@dataclass(frozen=True, kw_only=True)
class LayersDescription:
    """Some of an adapter's layers, or all of them.

    Attributes:
        ranks, scales: the smallest and the largest.
        dtypes: of the factors.
        bits_per_weight: bits of the factors for each weight of the layers that they are added to.
        error_before, error_after: means of the layers' relative errors in the compensation's report; None without.
    """

    number: int
    ranks: tuple[int, int]
    scales: tuple[float, float]
    dtypes: tuple[str, ...]
    num_bytes: int
    bits_per_weight: float
    error_before: float | None
    error_after: float | None


@dataclass(frozen=True, kw_only=True)
class Description:
    """An adapter.

    Attributes:
        total: of all layers.
        kinds: of the layers that share the last part of their names.
        unusual: what a plain adapter with a scale of 1 would not have, one sentence each.
    """

    folder: str
    base_model: str
    total: LayersDescription
    kinds: dict[str, LayersDescription]
    unusual: tuple[str, ...]


def describe(adapter: Adapter) -> Description:
    """From the configuration and the shapes; no factor is read."""
    errors = _reported_errors(adapter.folder)
    kinds: dict[str, list[str]] = {}
    for name in adapter.layers:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    total = _describe(adapter, list(adapter.layers), errors)
    return Description(
        folder=str(adapter.folder),
        base_model=adapter.base_model,
        total=total,
        kinds={kind: _describe(adapter, names, errors) for kind, names in sorted(kinds.items())},
        unusual=(*(oddity.meaning for oddity in adapter.oddities), *_unusual(adapter, total)),
    )


def _describe(adapter: Adapter, names: Sequence[str], errors: dict[str, tuple[float, float]]) -> LayersDescription:
    layers = [adapter.layers[name] for name in names]
    known = [errors[name] for name in names if name in errors]
    before, after = (sum(column) / len(known) for column in zip(*known, strict=True)) if known else (None, None)
    num_bytes = sum(layer.num_bytes for layer in layers)
    return LayersDescription(
        number=len(layers),
        ranks=(min(layer.rank for layer in layers), max(layer.rank for layer in layers)),
        scales=(min(layer.scale for layer in layers), max(layer.scale for layer in layers)),
        dtypes=tuple(sorted({_name_of_dtype(layer) for layer in layers})),
        num_bytes=num_bytes,
        bits_per_weight=8 * num_bytes / sum(layer.num_outputs * layer.num_inputs for layer in layers),
        error_before=before,
        error_after=after,
    )


def _unusual(adapter: Adapter, total: LayersDescription) -> list[str]:
    found = []
    if not adapter.base_model:
        found.append("it does not name its base model")
    if len(total.dtypes) > 1:
        found.append(f"its layers have different types of numbers: {', '.join(total.dtypes)}")
    smallest, largest = total.scales
    if smallest < largest:
        hint = " (rank_pattern without alpha_pattern)" if _has_only_ranks(adapter) else ""
        found.append(f"its layers have different scales, {smallest:g} to {largest:g}{hint}")
    elif smallest != 1:
        found.append(f"its scale is {smallest:g}, not 1")
    return found


def _has_only_ranks(adapter: Adapter) -> bool:
    return bool(adapter.config.get("rank_pattern")) and not adapter.config.get("alpha_pattern")


def _name_of_dtype(layer: AdapterLayer) -> str:
    return str(layer.dtype).removeprefix("torch.")


def _reported_errors(folder: Path) -> dict[str, tuple[float, float]]:
    """Each layer's relative error before and after compensation; nothing without a report, or with a foreign one."""
    try:
        layers = json.loads((folder / REPORT).read_text(encoding="utf-8"))["layers"]
        return {name: (float(layer["before"]), float(layer["after"])) for name, layer in layers.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
