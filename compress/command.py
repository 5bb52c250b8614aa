"""`longshadow compensate`: two models and a text in, an adapter and a report of what it bought out."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longshadow import __version__
from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.blocks import compensated
from longshadow.compress.calibration import Splits, read_documents, split_blocks
from longshadow.compress.evaluation import Quality, mean_and_interval, quality
from longshadow.compress.options import CompensationOptions
from longshadow.compress.pipeline import Compensation, compensate
from longshadow.compress.planning import num_layer_weights, plan_compensation
from longshadow.compress.report import report_files
from longshadow.compress.shards import Shards
from longshadow.compress.solver import Method
from longshadow.models import LoadedModel, load_model, model_files

OnBlock = Callable[[int, int, str], None]  # blocks that are done, of how many, and what is done


def run_compensation(
    original: str,
    quantized: str,
    output: Path,
    options: CompensationOptions,
    *,
    device: str | None = None,
    on_block: OnBlock | None = None,
) -> dict[str, Any]:
    """Writes the adapter to `output`, with the report in it, and returns the report.

    Finished blocks lie beside `output` until then, and a run with the same arguments goes on from them.

    Raises ValueError as `plan_compensation`, for models that cannot be loaded or do not match, and for a text that is
    too short.
    """
    plan = plan_compensation(original, quantized, output, options, device=device)
    documents = read_documents(options.calibration)
    first = load_model(original, device=device, max_memory=plan.estimate.original if plan.original_on_disk else None)
    second = load_model(quantized, device=device)
    check_vocabulary(first, second)
    splits = split_blocks(first.tokenizer, documents, length=options.sequence_length, samples=options.num_samples)
    splits = splits.to(second.model.device)
    key = run_key(original, quantized, options, splits)
    shards = {
        method: Shards(output.with_name(f".{output.name}.{method}.unfinished"), key) for method in options.methods
    }
    tried = {
        method: _compensated(first, second, splits.calibration, options, method, shards[method], on_block)
        for method in options.methods
    }
    selection = _divergences(first.model, second.model, tried, splits.selection) if len(tried) > 1 else {}
    method = min(selection, key=selection.__getitem__) if selection else options.methods[0]
    result = tried[method]
    report: dict[str, Any] = {
        "original": original,
        "quantized": quantized,
        "method": method,
        "selection": selection,
        "calibration": {"text": options.calibration, "samples": len(splits.calibration)},
        "sequence_length": options.sequence_length,
        "propagate": options.propagate,
        "adapter_bytes": result.num_weights * options.dtype.itemsize,
        "bits_per_weight": 8 * result.num_weights * options.dtype.itemsize / num_layer_weights(second.model),
        "versions": {"longshadow": __version__, "torch": torch.__version__},
        "report": measured(first.model, second.model, result, splits.report),
        "layers": {name: vars(layer) for name, layer in result.layers.items()},
    }
    save_adapter(output, result.factors, base_model=quantized, others=report_files(report))
    for finished in shards.values():
        finished.discard()
    return report


def _compensated(
    original: LoadedModel,
    quantized: LoadedModel,
    samples: torch.Tensor,
    options: CompensationOptions,
    method: Method,
    shards: Shards,
    on_block: OnBlock | None,
) -> Compensation:
    rank, budget = options.rank_or_budget(num_layer_weights(quantized.model))
    label = f"compensating, {method}" if len(options.methods) > 1 else "compensating"
    try:
        result = compensate(
            original.model,
            quantized.model,
            samples,
            rank=rank,
            budget=budget,
            uniform=options.uniform_rank,
            method=method,
            propagate=options.propagate,
            head=options.lm_head,
            dtype=options.dtype,
            shards=shards,
            on_block=None if on_block is None else lambda done, total: on_block(done, total, label),
        )
        if not result.factors:
            raise ValueError(f"{quantized.name} has the weights of {original.name}: there is nothing to compensate")
    except ValueError:
        shards.discard()  # the same command would fail again
        raise
    return result


def check_vocabulary(original: LoadedModel, quantized: LoadedModel) -> None:
    """Raises ValueError where the models do not speak of the same tokens."""
    sizes = [loaded.model.config.get_text_config().vocab_size for loaded in (original, quantized)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{original.name} has {sizes[0]:,} tokens and {quantized.name} {sizes[1]:,}: they are not one model"
        )


def run_key(original: str, quantized: str, options: CompensationOptions, splits: Splits) -> str:
    """Of everything that the factors depend on; models by the sizes and times of their files."""
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for name in (original, quantized)
        for path in model_files(name)
    ]
    chosen = {field.name: str(getattr(options, field.name)) for field in fields(options) if field.name != "max_memory"}
    text = json.dumps([__version__, original, quantized, files, chosen], sort_keys=True)
    return hashlib.sha256(text.encode() + splits.calibration.cpu().numpy().tobytes()).hexdigest()


def measured(original: nn.Module, quantized: nn.Module, result: Compensation, samples: torch.Tensor) -> dict[str, Any]:
    """Perplexity and divergence of the original, the quantised model, and that with the adapter, on unseen text."""
    before = quality(original, quantized, samples)
    with compensated(_hooked(quantized, result)):
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


def _divergences(
    original: nn.Module, quantized: nn.Module, tried: dict[Method, Compensation], samples: torch.Tensor
) -> dict[Method, float]:
    found = {}
    for method, result in tried.items():
        with compensated(_hooked(quantized, result)):
            found[method] = quality(original, quantized, samples).mean_divergence
    return found


def _hooked(model: nn.Module, result: Compensation) -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    like = model.get_input_embeddings().weight  # type: ignore[operator]
    return {
        name: (model.get_submodule(name), pair.lora_b.to(like), pair.lora_a.to(like))
        for name, pair in result.factors.items()
    }


def _row(quality: Quality) -> dict[str, float]:
    return {"perplexity": quality.perplexity, "divergence": quality.mean_divergence}
