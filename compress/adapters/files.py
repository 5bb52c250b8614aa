"""Compensation as an ordinary LoRA adapter: the two files that PEFT, and what reads its format, load."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from longshadow.compress.adapters.atomic import whole_folder
from longshadow.compress.solver import Factors
from longshadow.model_sources import lasting_name

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    folder: Path, layers: Mapping[str, Factors], *, base_model: str, others: Mapping[str, str | bytes] | None = None
) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`, and `others` beside them: all or none.

    Every layer has a scale of 1: its alpha is its rank. `alpha_pattern` and `rank_pattern` say so for each of them
    under its whole name. For runtimes that know no patterns, `lora_alpha` is `r`, the largest rank. `init_lora_weights`
    stays true, since other values ask runtimes to change the base model.

    Args:
        folder: must not exist, or be empty.
        layers: by the names of the modules in the base model; layers of rank 0 are left out by the caller.
        base_model: where runtimes find the quantised model: a folder, which is recorded as its whole path, or a hub id.
        others: contents of more files, by their names.

    Raises ValueError where the folder holds something, or there are no layers.
    """
    if not layers:
        raise ValueError("there is no layer to write an adapter for")
    tensors = {}
    for name, factors in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = factors.lora_a.contiguous().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = factors.lora_b.contiguous().cpu()
    text = json.dumps(adapter_config(layers, lasting_name(base_model)), indent=2) + "\n"
    with whole_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        for name, content in {CONFIG: text, **(others or {})}.items():
            (partial / name).write_bytes(content.encode() if isinstance(content, str) else content)


def adapter_config(layers: Mapping[str, Factors], base_model: str) -> dict[str, object]:
    """PEFT's configuration of an adapter with these ranks."""
    ranks = {name: factors.rank for name, factors in layers.items()}
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
