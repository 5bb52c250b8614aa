"""`longshadow compensate`: two models and a text in, an adapter and a report of what it bought out."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longshadow.compress.adapter import save_adapter
from longshadow.compress.blocks import compensated
from longshadow.compress.calibration import read_documents, split_blocks
from longshadow.compress.evaluation import Quality, mean_and_interval, quality
from longshadow.compress.pipeline import Compensation, Propagate, compensate
from longshadow.models import LoadedModel, load_model

REPORT = "compensation_report.json"
BYTES_PER_MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class CompensationOptions:
    """What the command line says; `rank` or `budget_mb`, not both."""

    rank: int | None = None
    budget_mb: float | None = None
    calibration: str = "builtin"
    sequence_length: int = 512
    num_samples: int = 64
    propagate: Propagate = "sequential"
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.rank is not None and self.budget_mb is not None:
            raise ValueError("give --rank or --budget-mb, not both")
        for name, value in (("rank", self.rank), ("sequence-length", self.sequence_length)):
            if value is not None and value < (1 if name == "rank" else 2):
                raise ValueError(f"--{name} must be at least {1 if name == 'rank' else 2}, got {value}")
        if self.num_samples < 1:
            raise ValueError(f"--num-samples must be at least 1, got {self.num_samples}")
        if self.budget_mb is not None and not self.budget_mb > 0:
            raise ValueError(f"--budget-mb must be above 0, got {self.budget_mb:g}")


def run_compensation(
    original: str,
    quantized: str,
    output: Path,
    options: CompensationOptions,
    *,
    device: str | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the adapter to `output`, with the report in it, and returns the report.

    Raises ValueError for models that cannot be loaded or do not match, a text that is too short, and an output folder
    that holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} holds something already: choose another --output")
    documents = read_documents(options.calibration)
    first, second = load_model(original, device=device), load_model(quantized, device=device)
    check_vocabulary(first, second)
    splits = split_blocks(first.tokenizer, documents, length=options.sequence_length, samples=options.num_samples)
    place = first.model.device
    budget = options.budget_mb
    result = compensate(
        first.model,
        second.model,
        splits.calibration.to(place),
        rank=None if budget is not None else options.rank or 32,
        budget=None if budget is None else int(budget * BYTES_PER_MB / options.dtype.itemsize),
        propagate=options.propagate,
        dtype=options.dtype,
        on_block=on_block,
    )
    if not result.factors:
        raise ValueError(f"{quantized} has the weights of {original}: there is nothing to compensate")
    report = {
        "original": original,
        "quantized": quantized,
        "calibration": {"text": options.calibration, "samples": len(splits.calibration)},
        "sequence_length": options.sequence_length,
        "propagate": options.propagate,
        "adapter_bytes": result.num_weights * options.dtype.itemsize,
        "report": measured(first.model, second.model, result, splits.report.to(place)),
        "layers": {name: vars(layer) for name, layer in result.layers.items()},
    }
    save_adapter(output, result.factors, base_model=quantized, others={REPORT: json.dumps(report, indent=1) + "\n"})
    return report


def check_vocabulary(original: LoadedModel, quantized: LoadedModel) -> None:
    """Raises ValueError where the models do not speak of the same tokens."""
    sizes = [loaded.model.config.get_text_config().vocab_size for loaded in (original, quantized)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{original.name} has {sizes[0]:,} tokens and {quantized.name} {sizes[1]:,}: they are not one model"
        )


def measured(original: nn.Module, quantized: nn.Module, result: Compensation, samples: torch.Tensor) -> dict[str, Any]:
    """Perplexity and divergence of the original, the quantised model, and that with the adapter, on unseen text."""
    parameter = next(quantized.parameters())
    layers = {
        name: (quantized.get_submodule(name), pair.lora_b.to(parameter), pair.lora_a.to(parameter))
        for name, pair in result.factors.items()
    }
    before = quality(original, quantized, samples)
    with compensated(layers):
        after = quality(original, quantized, samples)
    gains = [old - new for old, new in zip(before.divergence, after.divergence, strict=True)]
    mean, low, high = mean_and_interval(gains)
    return {
        "samples": len(samples),
        "original": _row(quality(original, original, samples)),
        "quantized": _row(before),
        "compensated": _row(after),
        "recovered": mean / before.mean_divergence if before.mean_divergence else 0.0,
        "divergence_removed": {"mean": mean, "low": low, "high": high},
    }


def _row(quality: Quality) -> dict[str, float]:
    return {"perplexity": quality.perplexity, "divergence": quality.mean_divergence}
