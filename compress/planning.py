"""Whether a run can be made at all, said before it starts: the output folder, memory, and disk."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from longshadow.compress.blocks import compensated_blocks, layer_shape, linear_layers
from longshadow.compress.estimate import Estimate, Speed, estimated
from longshadow.compress.options import CompensationOptions
from longshadow.model_sources import DENSE, GGUF_SUFFIX, model_files, quantization_method, read_config
from longshadow.models import choose_device, empty_model


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take, and whether the original stays on disk meanwhile; `available` in bytes."""

    estimate: Estimate
    original_on_disk: bool
    available: int

    @property
    def fits(self) -> bool:
        """Whether memory suffices."""
        return self.estimate.memory <= self.available

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
    [plan] = expected_plans(original, quantized, [options], device=device)
    if not plan.fits:
        raise ValueError(
            f"this needs {_gigabytes(plan.estimate.memory)} of memory, and {_gigabytes(plan.available)} are "
            f"{'allowed' if options.max_memory else 'free'}: take a smaller --num-samples or --sequence-length"
        )
    # The finished blocks and the adapter made of them.
    require_room(output, 2 * plan.estimate.adapter * len(options.methods))
    return plan


def expected_plans(
    original: str, quantized: str, options: Sequence[CompensationOptions], *, device: str | None = None
) -> list[Plan]:
    """What a run with each of the options takes: with the original on disk only where memory does not hold it.

    Reads configurations and file sizes, and no weights. Raises ValueError for a model that is an adapter, or has no
    readable configuration.
    """
    for name in (original, quantized):
        if (Path(name) / "adapter_config.json").is_file():
            raise ValueError(f"{name} is a LoRA adapter: give the model without it, and `adapter merge` the two later")
    place = choose_device(device)
    model, speed = empty_model(original), Speed.measured(place)
    itemsize = 4 if place.type == "cpu" else 2
    dense = sum(parameter.numel() for parameter in model.parameters()) * itemsize
    is_packed = quantization_method(read_config(quantized)) != DENSE
    quantized_bytes = sum(path.stat().st_size for path in model_files(quantized)) if is_packed else dense
    # A GGUF file is always read whole.
    can_stay_on_disk = not original.lower().endswith(GGUF_SUFFIX)

    def plan_of(chosen: CompensationOptions, on_disk: bool) -> Plan:
        rank, budget = chosen.rank_or_budget(layer_shapes(model, head=chosen.lm_head))
        estimate = estimated(
            model,
            quantized_bytes=quantized_bytes,
            itemsize=itemsize,
            num_samples=chosen.num_samples,
            length=chosen.sequence_length,
            rank=rank,
            budget=budget,
            adapter_itemsize=chosen.dtype.itemsize,
            methods=chosen.methods,
            head=chosen.lm_head,
            original_on_disk=on_disk,
            speed=speed,
        )
        return Plan(estimate=estimate, original_on_disk=on_disk, available=chosen.max_memory or _free_memory(place))

    plans = []
    for chosen in options:
        plan = plan_of(chosen, on_disk=False)
        plans.append(plan if plan.fits or not can_stay_on_disk else plan_of(chosen, on_disk=True))
    return plans


def require_room(folder: Path, num_bytes: int) -> None:
    """Raises ValueError where the disk that the folder is on, or will be, has fewer bytes left."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise ValueError(
            f"{place} has {_gigabytes(free)} left on its disk, and {_gigabytes(num_bytes)} are needed: free some "
            "space, or choose a folder on another disk"
        )


def layer_shapes(model: nn.Module, *, head: bool = False) -> list[tuple[int, int]]:
    """(m, n) of all linear layers in the blocks, and of the head where it is asked for."""
    blocks = compensated_blocks(model, head=head)
    return [layer_shape(layer) for block in blocks for layer in linear_layers(block).values()]


def num_layer_weights(model: nn.Module) -> int:
    """Of all linear layers in the blocks."""
    return sum(outputs * inputs for outputs, inputs in layer_shapes(model))


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
