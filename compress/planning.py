"""Whether a run can be made at all, said before it starts: the output folder, memory, and disk."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from longshadow.compress.blocks import decoder_blocks, layer_shape, linear_layers
from longshadow.compress.estimate import Estimate, Speed, estimated
from longshadow.compress.options import CompensationOptions
from longshadow.models import choose_device, empty_model, is_quantized, model_files


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take, and whether the original stays on disk meanwhile; `available` in bytes."""

    estimate: Estimate
    original_on_disk: bool
    available: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        numbers = {**vars(self.estimate), "memory": self.estimate.memory}
        return {**numbers, "original_on_disk": self.original_on_disk, "available": self.available}


def plan_compensation(
    original: str, quantized: str, output: Path, options: CompensationOptions, *, device: str | None = None
) -> Plan:
    """Reads configurations and file sizes, and no weights.

    Raises ValueError for an output folder that holds something, a model that is an adapter, and where memory or disk
    will not do.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} holds something already: choose another --output")
    for name in (original, quantized):
        if (Path(name) / "adapter_config.json").is_file():
            raise ValueError(f"{name} is a LoRA adapter: give the model without it, and `adapter merge` the two later")
    place = choose_device(device)
    model = empty_model(original)
    itemsize = 4 if place.type == "cpu" else 2
    dense = sum(parameter.numel() for parameter in model.parameters()) * itemsize
    packed = sum(path.stat().st_size for path in model_files(quantized))
    num_weights = num_layer_weights(model)
    rank, budget = options.rank_or_budget(num_weights)
    available = options.max_memory or _free_memory(place)
    plans = [
        Plan(
            estimate=estimated(
                model,
                quantized_bytes=packed if is_quantized(Path(quantized)) else dense,
                itemsize=itemsize,
                num_samples=options.num_samples,
                length=options.sequence_length,
                rank=rank,
                budget=budget,
                adapter_itemsize=options.dtype.itemsize,
                num_methods=len(options.methods),
                original_on_disk=on_disk,
                speed=Speed.measured(place),
            ),
            original_on_disk=on_disk,
            available=available,
        )
        # A GGUF file is always read whole.
        for on_disk in ((False,) if original.lower().endswith(".gguf") else (False, True))
    ]
    plan = next((plan for plan in plans if plan.estimate.memory <= available), None)
    if plan is None:
        raise ValueError(
            f"this needs {_gigabytes(plans[-1].estimate.memory)} of memory, and {_gigabytes(available)} are "
            f"{'allowed' if options.max_memory else 'free'}: take a smaller --num-samples or --sequence-length"
        )
    folder = next(path for path in (output, *output.absolute().parents) if path.exists())
    # The finished blocks and the adapter made of them.
    needed, free = 2 * plan.estimate.adapter * len(options.methods), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder} has {_gigabytes(free)} left on its disk, and {_gigabytes(needed)} are needed")
    return plan


def num_layer_weights(model: nn.Module) -> int:
    """Of all linear layers in the blocks."""
    shapes = (layer_shape(layer) for block in decoder_blocks(model) for layer in linear_layers(block).values())
    return sum(outputs * inputs for outputs, inputs in shapes)


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
