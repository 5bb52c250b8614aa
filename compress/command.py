"""`longshadow compensate`: two models and a text in, an adapter and a report of what it bought out."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longshadow import __version__
from longshadow.compress.adapters.files import save_adapter
from longshadow.compress.blocks import LowRankTerms
from longshadow.compress.calibration import Splits, read_documents, split_blocks
from longshadow.compress.criterion import Method
from longshadow.compress.evaluation import ORIGINAL, Quality, Variant, difference, qualities
from longshadow.compress.fingerprint import model_fingerprint
from longshadow.compress.matching import head_is_changed
from longshadow.compress.options import CompensationOptions
from longshadow.compress.pipeline import Compensation, compensate
from longshadow.compress.planning import layer_shapes, plan_compensation
from longshadow.compress.provenance import changed_beside_layers
from longshadow.compress.report import report_files
from longshadow.compress.shards import Shards
from longshadow.compress.storage import is_plain
from longshadow.model_sources import GGUF_SUFFIX, lasting_name
from longshadow.models import LoadedModel, load_model, shared_tokenizer

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, str, str], None]  # steps that are done, of how many, of what work, and what a step is


def run_compensation(
    original: str,
    quantized: str,
    output: Path,
    options: CompensationOptions,
    *,
    device: str | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Writes the adapter to `output`, with the report in it, and returns the report.

    Finished blocks lie beside `output` until then, and a run with the same arguments goes on from them.

    Raises ValueError as `plan_compensation`, for models that cannot be loaded or do not match, and for a text that is
    too short.
    """
    output = output.resolve()  # `.` has no name to put another beside
    plan = plan_compensation(original, quantized, output, options, device=device)
    tokenizer = shared_tokenizer(original, quantized)
    splits = split_blocks(
        tokenizer,
        read_documents(options.calibration, column=options.calibration_column),
        length=options.sequence_length,
        samples=options.num_samples,
        add_special_tokens=options.add_special_tokens,
    )
    limit = plan.estimate.original if plan.original_on_disk else None
    first = load_model(original, device=device, max_memory=limit, tokenizer=tokenizer)
    second = load_model(quantized, device=device, tokenizer=tokenizer)
    check_models(first, second)
    changed = changed_beside_layers(first.model, second.model, packed=quantized.lower().endswith(GGUF_SUFFIX))
    if changed is not None:
        logger.warning(
            "%s was hardly made of %s: %s, which quantisation leaves alone. Give the revision that was quantised",
            quantized,
            original,
            changed,
        )
    splits = splits.to(second.model.device)
    head = options.lm_head and head_is_changed(first.model, second.model)
    if options.lm_head and not head:
        logger.warning("--lm-head: %s has the head of %s, which is left as it is", quantized, original)
    key = run_key(original, quantized, options, splits)
    shards = {
        method: Shards(output.with_name(f".{output.name}.{method}.unfinished"), key) for method in options.methods
    }
    try:
        tried = {
            method: _compensated(first, second, splits.calibration, options, method, head, shards[method], on_step)
            for method in options.methods
        }
    except ValueError:
        for unfinished in shards.values():
            unfinished.discard()  # the same command would fail again
        raise
    selection: dict[Method, float] = {}
    if len(tried) > 1:
        variants: dict[str, Variant] = {method: _variant(second.model, result) for method, result in tried.items()}
        compared = qualities(first.model, variants, splits.selection, _counter(on_step, "choosing the method"))
        selection = {method: compared[method].mean_divergence for method in tried}
    method = min(selection, key=selection.__getitem__) if selection else options.methods[0]
    result = tried[method]
    report: dict[str, Any] = {
        "original": lasting_name(original),
        "quantized": lasting_name(quantized),
        "method": method,
        "shrinkage": options.shrinkage,
        "selection": selection,
        "calibration": {
            "text": options.calibration,
            "samples": len(splits.calibration),
            "add_special_tokens": options.add_special_tokens,
        },
        "sequence_length": options.sequence_length,
        "propagate": options.propagate,
        "adapter_bytes": result.num_weights * options.dtype.itemsize,
        "bits_per_weight": 8 * result.num_weights * options.dtype.itemsize / result.num_compensated_weights,
        "left_out": None if result.left_out is None else asdict(result.left_out),
        "versions": {"longshadow": __version__, "torch": torch.__version__},
        "report": measured(first.model, second.model, result, splits.report, _counter(on_step, "measuring")),
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
    head: bool,
    shards: Shards,
    on_step: OnStep | None,
) -> Compensation:
    rank, budget = options.rank_or_budget(layer_shapes(quantized.model, head=head))
    label = f"compensating, {method}" if len(options.methods) > 1 else "compensating"
    result = compensate(
        original.model,
        quantized.model,
        samples,
        rank=rank,
        budget=budget,
        uniform=options.uniform_rank,
        method=method,
        shrinkage=options.shrinkage,
        propagate=options.propagate,
        head=head,
        dtype=options.dtype,
        shards=shards,
        on_block=_counter(on_step, label, "layer"),
    )
    if not result.factors:
        raise ValueError(f"{quantized.name} has the weights of {original.name}: there is nothing to compensate")
    return result


def check_models(original: LoadedModel, quantized: LoadedModel) -> None:
    """Raises ValueError where the models do not speak of the same tokens, or one is damaged or has a LoRA in it."""
    sizes = [loaded.model.config.get_text_config().vocab_size for loaded in (original, quantized)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{original.name} has {sizes[0]:,} tokens and {quantized.name} {sizes[1]:,}: they are not one model"
        )
    for loaded in (original, quantized):
        for name, parameter in loaded.model.named_parameters():
            if ".lora_A." in name:
                raise ValueError(
                    f"{loaded.name} has a LoRA adapter in it: give the model without, and `adapter merge` the two later"
                )
            if not _is_finite(parameter.detach()):
                raise ValueError(f"{loaded.name} has weights that are not finite, in {name}: get its files again")


def _is_finite(weight: torch.Tensor) -> bool:
    """Of ordinary weights in memory; those of a library's own kind, or on disk, are looked at block by block."""
    if not is_plain(weight) or weight.dtype.itemsize < 2 or weight.is_meta or weight.numel() == 0:
        return True
    return all(bool(end.isfinite()) for end in weight.aminmax())


def run_key(original: str, quantized: str, options: CompensationOptions, splits: Splits) -> str:
    """Of everything that the factors depend on; models by the sizes and times of their files."""
    files = [model_fingerprint(name) for name in (original, quantized)]
    chosen = {field.name: str(getattr(options, field.name)) for field in fields(options) if field.name != "max_memory"}
    text = json.dumps([__version__, original, quantized, files, chosen], sort_keys=True)
    return hashlib.sha256(text.encode() + splits.calibration.cpu().numpy().tobytes()).hexdigest()


def measured(
    original: nn.Module,
    quantized: nn.Module,
    result: Compensation,
    samples: torch.Tensor,
    on_sample: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity and divergence of the original, the quantised model, and that with the adapter, on unseen text."""
    variants = {"quantized": Variant(model=quantized), "compensated": _variant(quantized, result)}
    found = qualities(original, variants, samples, on_sample)
    before = found["quantized"]
    removed = difference(before, found["compensated"])
    return {
        "samples": len(samples),
        **{name: _row(found[name]) for name in (ORIGINAL, *variants)},
        "recovered": removed["mean"] / before.mean_divergence if before.mean_divergence else 0.0,
        "divergence_removed": removed,
    }


def _variant(model: nn.Module, result: Compensation) -> Variant:
    # A quantised embedding may be of a library's own kind.
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    device, dtype = embedding.device, embedding.dtype if embedding.is_floating_point() else torch.float32
    added: LowRankTerms = {
        name: (model.get_submodule(name), pair.lora_b.to(device, dtype), pair.lora_a.to(device, dtype))
        for name, pair in result.factors.items()
    }
    return Variant(model=model, added=added)


def _counter(on_step: OnStep | None, work: str, step: str = "sample") -> Callable[[int, int], None] | None:
    return None if on_step is None else lambda done, total: on_step(done, total, work, step)


def _row(quality: Quality) -> dict[str, float | None]:
    return {"perplexity": quality.perplexity, "loss": quality.mean_loss, "divergence": quality.mean_divergence}
