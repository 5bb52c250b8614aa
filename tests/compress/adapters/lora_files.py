"""Adapters to test with: random factors for a model, and a LoRA's folder written without the package's own code."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from longshadow.compress.solver import Factors


def factors_for(
    model: nn.Module, *, ranks: Sequence[int] = (1, 2, 3, 4, 5), seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Factors]:
    """For every linear layer but the head; ranks by turns."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    generator = torch.Generator().manual_seed(seed)

    def factors(rank: int, module: nn.Linear) -> Factors:
        return Factors(
            lora_b=torch.randn(module.out_features, rank, generator=generator).to(dtype),
            lora_a=torch.randn(rank, module.in_features, generator=generator).to(dtype),
        )

    return {
        name: factors(ranks[number % len(ranks)], module)
        for number, (name, module) in enumerate(linears)
        if name != "lm_head"
    }


def write_lora(
    folder: Path, layers: Mapping[str, Factors], others: Mapping[str, torch.Tensor] | None = None, **config: Any
) -> Path:
    """As PEFT would, with its defaults unless `config` says otherwise; `others` are more tensors."""
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{name}.lora_A.weight": layer.lora_a for name, layer in layers.items()}
    tensors |= {f"base_model.model.{name}.lora_B.weight": layer.lora_b for name, layer in layers.items()}
    save_file({**tensors, **(others or {})}, folder / "adapter_model.safetensors")
    stated = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/Model",
        "r": 8,
        "lora_alpha": 8,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps({**stated, **config}), encoding="utf-8")
    return folder


@torch.no_grad()
def with_products(model: nn.Module, *adapters: tuple[Mapping[str, Factors], Mapping[str, float]]) -> nn.Module:
    """The model with s B A added to its weights, for factors and scales by layer; in fp64 until the last step."""
    for layers, scales in adapters:
        for name, factors in layers.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            product = factors.lora_b.double() @ factors.lora_a.double()
            weight.copy_(weight.double() + scales[name] * product)
    return model
