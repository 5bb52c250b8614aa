"""`longshadow adapter export --to merged`: the base as an ordinary model folder, with s B A added to its weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longshadow.compress.adapters.atomic import whole_folder
from longshadow.compress.adapters.bases import Base
from longshadow.compress.adapters.exported import Exported
from longshadow.compress.adapters.installing import misfits
from longshadow.compress.adapters.reading import Adapter
from longshadow.model_sources import DENSE
from longshadow.models import load_model

SHARD = "5GB"


def export_merged(adapter: Adapter, base: Base, output: Path, dtype: torch.dtype | None = None) -> Exported:
    """Writes safetensors, configuration and tokenizer.

    Args:
        base: must be dense: weights that are stored quantised cannot take B A without being quantised again.
        dtype: of the model; default: the one that the base is stored in.

    Raises ValueError for a base that is not dense, or not the adapter's, for an adapter that is no plain one, and where
    the output folder holds something.
    """
    adapter.require_plain()
    if base.method != DENSE:
        raise ValueError(
            f"the weights of {base.name} are stored quantised ({base.method}): adding the adapter to them would mean "
            "to quantise them again and lose it; serve it as an adapter"
        )
    with whole_folder(output) as partial:
        loaded = load_model(base.name, dtype=dtype or getattr(base.config, "dtype", None), device="cpu")
        lost = merge_into(loaded.model, adapter)
        model: Any = loaded.model
        model.save_pretrained(partial, max_shard_size=SHARD)
        loaded.tokenizer.save_pretrained(partial)
        num_bytes = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    return Exported(
        format="merged",
        output=str(output),
        layers=len(adapter.layers),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        num_bytes=num_bytes,
        detail=f"{lost:.1%} of the adapter lost to rounding, at most",
    )


@torch.no_grad()
def merge_into(model: nn.Module, adapter: Adapter) -> float:
    """W + s B A in every layer, computed in fp64 and rounded once to W's dtype.

    Returns the largest ||rounding|| / ||s B A|| of a layer. Raises ValueError where the adapter is for another model,
    a layer is no ordinary linear one, or its weight is shared with another module.
    """
    for problem in misfits(model, adapter):
        raise ValueError(f"{adapter.folder} is for another model: {problem}")
    lost = 0.0
    for name in adapter.layers:
        layer = model.get_submodule(name)
        if type(layer) is not nn.Linear or not layer.weight.is_floating_point():
            raise ValueError(f"{name} is no dense linear layer but a {type(layer).__name__}: serve it as an adapter")
        if any(other is not layer for other in _holders(model, layer.weight)):
            raise ValueError(
                f"{name} shares its weight with another module, which B A must not change: serve it as an adapter"
            )
        product = adapter.folded(name, torch.float64).product
        exact = layer.weight.double() + product
        layer.weight.copy_(exact)
        norm = float(product.norm())
        lost = max(lost, float((layer.weight.double() - exact).norm()) / norm if norm else 0.0)
    return lost


def _holders(model: nn.Module, weight: torch.Tensor) -> Iterator[nn.Module]:
    return (module for module in model.modules() if any(p is weight for p in module.parameters(recurse=False)))
