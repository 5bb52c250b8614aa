"""What an adapter is worth on unseen text: against the quantised model without it, and the same bytes spent on bits."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longshadow.compress.adapters.installing import device_of, misfits
from longshadow.compress.adapters.reading import Adapter, read_adapter
from longshadow.compress.blocks import compensated, decoder_blocks, layer_shape, linear_layers
from longshadow.compress.calibration import read_documents, split_blocks
from longshadow.compress.evaluation import Quality, mean_and_interval, quality
from longshadow.compress.planning import num_layer_weights
from longshadow.compress.rounding import finest_rounding
from longshadow.compress.storage import stored_bits_per_weight
from longshadow.models import load_model


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """The report part of `source` is read, as `longshadow compensate` deals it out for the same numbers."""

    source: str = "builtin"
    length: int = 512
    num_samples: int = 64


def evaluate_adapter(
    folder: Path,
    original: str,
    quantized: str,
    text: EvaluationText,
    *,
    bits_per_weight: float | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Perplexity and divergence from the original, with paired 95 % intervals of their differences.

    Args:
        bits_per_weight: of the quantised layers, scales included; needed where they are stored as ordinary numbers.

    The last row, "same bytes as bits", is the original rounded to nearest with as many bits per weight as quantised
    layers and adapter have together, or a little fewer; it is left out where the number is not known.

    Raises ValueError for an adapter, a model or a text that cannot be read or does not fit.
    """
    adapter = read_adapter(folder)
    adapter.require_plain()
    documents = read_documents(text.source)
    first, second = load_model(original, device=device), load_model(quantized, device=device)
    for problem in misfits(second.model, adapter):
        raise ValueError(f"{folder} is for another model: {problem}")
    samples = split_blocks(first.tokenizer, documents, length=text.length, samples=text.num_samples).report
    samples = samples.to(second.model.device)
    before = quality(first.model, second.model, samples)
    with compensated(_layers(second.model, adapter)):
        after = quality(first.model, second.model, samples)
    rows = {
        "original": quality(first.model, first.model, samples),
        "quantised": before,
        "with the adapter": after,
    }
    layers = [layer for block in decoder_blocks(second.model) for layer in linear_layers(block).values()]
    bits = bits_per_weight or stored_bits_per_weight(layers)
    bits_of_adapter = 8 * adapter.num_bytes / num_layer_weights(second.model)
    report: dict[str, Any] = {
        "adapter": str(folder),
        "original": original,
        "quantized": quantized,
        "samples": len(samples),
        "bits_per_weight": {"quantised": bits, "adapter": bits_of_adapter},
        "removed_by_adapter": _difference(before, after),
    }
    widths = {layer_shape(layer)[1] for layer in layers}
    rounding = None if bits is None else finest_rounding(bits + bits_of_adapter, widths)
    if rounding is not None:
        rows["same bytes as bits"] = rounded = quality(first.model, _rounded(first.model, rounding), samples)
        report["rounding"] = {"name": rounding.name, "bits_per_weight": rounding.bits_per_weight}
        report["adapter_over_rounding"] = _difference(rounded, after)
    report["rows"] = {
        name: {"perplexity": found.perplexity, "divergence": found.mean_divergence} for name, found in rows.items()
    }
    return report


def _rounded(model: nn.Module, rounding: Any) -> nn.Module:
    """A copy whose blocks' linear layers are rounded."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for block in decoder_blocks(rounded):
            for layer in linear_layers(block).values():
                weight = layer.get_parameter("weight")
                weight.copy_(rounding(weight))
    return rounded


def _layers(model: nn.Module, adapter: Adapter) -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    like = model.get_input_embeddings().weight  # type: ignore[operator]
    layers = {}
    for name in adapter.layers:
        layer, factors = model.get_submodule(name), adapter.folded(name, like.dtype)
        layers[name] = (layer, factors.lora_b.to(device_of(layer)), factors.lora_a.to(device_of(layer)))
    return layers


def _difference(worse: Quality, better: Quality) -> dict[str, float]:
    """By how many nats the divergence is smaller, sample by sample."""
    mean, low, high = mean_and_interval(
        [old - new for old, new in zip(worse.divergence, better.divergence, strict=True)]
    )
    return {"mean": mean, "low": low, "high": high}
