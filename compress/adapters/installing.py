"""An adapter in a loaded model, for good, without PEFT: every adapted layer adds s B A x to its output."""

import logging
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn

from longshadow.compress.adapters.reading import Adapter
from longshadow.compress.blocks import add_low_rank
from longshadow.report import format_bytes

if TYPE_CHECKING:
    from longshadow.models import LoadedModel

logger = logging.getLogger(__name__)


def with_adapter(loaded: "LoadedModel", adapter: Adapter) -> "LoadedModel":
    """Installs an adapter in a loaded model, and says so in the model's name.

    Raises ValueError as `install_adapter`.
    """
    install_adapter(loaded.model, adapter, loaded.model.dtype)
    size = format_bytes(adapter.num_bytes)
    logger.info("adapter %s: %d layers, rank %d at most, %s", adapter.folder, len(adapter.layers), adapter.rank, size)
    return replace(loaded, name=f"{loaded.name} with {adapter.folder}")


def install_adapter(model: nn.Module, adapter: Adapter, dtype: torch.dtype) -> None:
    """Adds the adapter to the model.

    Args:
        dtype: that B A x is computed in; of the model.

    Raises ValueError where the adapter is more than a plain one, or for another model; then nothing is added.
    """
    adapter.require_plain()
    for problem in misfits(model, adapter):
        raise ValueError(f"{adapter.folder} is for another model: {problem}")
    layers = {}
    for name in adapter.layers:
        layer = model.get_submodule(name)
        factors, device = adapter.folded(name, dtype), device_of(layer)
        layers[name] = (layer, factors.lora_b.to(device), factors.lora_a.to(device))
    for layer, b, a in layers.values():
        add_low_rank(layer, b, a)


def misfits(model: nn.Module, adapter: Adapter) -> list[str]:
    """Layers of the adapter that the model lacks, or has in another shape; one sentence each."""
    modules = dict(model.named_modules())
    problems = []
    for name, layer in adapter.layers.items():
        module = modules.get(name)
        if module is None:
            problems.append(f"it has no layer {name}")
            continue
        shape = shape_of(module)
        if None in shape:
            problems.append(f"its {name} is no linear layer but a {type(module).__name__}")
        elif shape != [layer.num_outputs, layer.num_inputs]:
            problems.append(f"its {name} is {shape}, the adapter's {[layer.num_outputs, layer.num_inputs]}")
    return problems


def shape_of(module: nn.Module) -> list[int | None]:
    """Outputs and inputs of a linear layer, or of transformers' Conv1D, which keeps its weight transposed."""
    names = ("nf", "nx") if type(module).__name__ == "Conv1D" else ("out_features", "in_features")
    return [getattr(module, name, None) for name in names]


def device_of(layer: nn.Module) -> torch.device:
    """Where the layer's weight lies, whether it is a parameter or packed in a buffer."""
    tensor = next(chain(layer.parameters(), layer.buffers()))
    return tensor.device
