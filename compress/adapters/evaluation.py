"""What an adapter is worth on unseen text: against the quantised model without it, and the same bytes spent on bits."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longshadow.compress.adapters.installing import device_of, misfits
from longshadow.compress.adapters.reading import Adapter, read_adapter
from longshadow.compress.blocks import LowRankTerms, decoder_blocks, layer_shape, linear_layers
from longshadow.compress.calibration import split_blocks
from longshadow.compress.documents import Document
from longshadow.compress.evaluation import ORIGINAL, Variant, difference, qualities
from longshadow.compress.planning import num_layer_weights
from longshadow.compress.rounding import finest_rounding
from longshadow.compress.storage import stored_bits_per_weight
from longshadow.models import LoadedModel, load_model, shared_tokenizer

QUANTISED, ADAPTED, ROUNDED = "quantised", "with the adapter", "same bytes as bits"
# Of weights before quantisation, in fp32.
MAX_BITS = 32


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """The report part of `documents` is read, as `longshadow compensate` deals it out for the same numbers."""

    documents: list[Document]
    length: int = 512
    num_samples: int = 64
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"--sequence-length must be at least 2, got {self.length}")
        if self.num_samples < 1:
            raise ValueError(f"--num-samples must be at least 1, got {self.num_samples}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """An adapter with its two models, loaded.

    `bits_per_weight` is that of the quantised layers, scales included; None where it is to be seen.
    """

    adapter: Adapter
    original: LoadedModel
    quantized: LoadedModel
    bits_per_weight: float | None = None

    def variants(self) -> dict[str, Variant]:
        """The quantised model without the adapter and with it."""
        model = self.quantized.model
        return {QUANTISED: Variant(model=model), ADAPTED: Variant(model=model, added=_terms(model, self.adapter))}

    def models(self) -> dict[str, Variant]:
        """The original, too."""
        return {ORIGINAL: Variant(model=self.original.model), **self.variants()}


def load_subject(
    folder: Path,
    original: str,
    quantized: str,
    *,
    bits_per_weight: float | None = None,
    device: str | None = None,
) -> Subject:
    """Both models of an adapter.

    Raises ValueError for an adapter or a model that cannot be read, where they do not fit, and for bits out of range.
    """
    if bits_per_weight is not None and not 0 < bits_per_weight <= MAX_BITS:
        raise ValueError(f"--bits-per-weight must be above 0 and at most {MAX_BITS}, got {bits_per_weight:g}")
    adapter = read_adapter(folder)
    adapter.require_plain()
    tokenizer = shared_tokenizer(original, quantized)
    first, second = (load_model(name, device=device, tokenizer=tokenizer) for name in (original, quantized))
    for problem in misfits(second.model, adapter):
        raise ValueError(f"{folder} is for another model: {problem}")
    return Subject(adapter=adapter, original=first, quantized=second, bits_per_weight=bits_per_weight)


def evaluate_on_text(
    subject: Subject,
    text: EvaluationText,
    *,
    on_sample: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity and divergence from the original, with paired 95 % intervals of their differences.

    `on_sample` is called with the number of samples that are done and of all.

    The last row, "same bytes as bits", is the original rounded to nearest with as many bits per weight as quantised
    layers and adapter have together, or a little fewer; it is left out where the number is neither given nor to be
    seen, as of layers that are stored as ordinary numbers.

    Raises ValueError for a text that is too short.
    """
    first, second, adapter = subject.original, subject.quantized, subject.adapter
    samples = split_blocks(
        first.tokenizer,
        text.documents,
        length=text.length,
        samples=text.num_samples,
        add_special_tokens=text.add_special_tokens,
    ).report
    variants = subject.variants()
    layers = [layer for block in decoder_blocks(second.model) for layer in linear_layers(block).values()]
    bits = stored_bits_per_weight(layers) if subject.bits_per_weight is None else subject.bits_per_weight
    bits_of_adapter = 8 * adapter.num_bytes / num_layer_weights(second.model)
    widths = {layer_shape(layer)[1] for layer in layers}
    rounding = None if bits is None else finest_rounding(bits + bits_of_adapter, widths)
    if rounding is not None:
        variants[ROUNDED] = Variant(model=_rounded(first.model, rounding))
    found = qualities(first.model, variants, samples.to(second.model.device), on_sample)
    report: dict[str, Any] = {
        "adapter": str(adapter.folder),
        "original": first.name,
        "quantized": second.name,
        "samples": len(samples),
        "bits_per_weight": {"quantised": bits, "adapter": bits_of_adapter},
        "removed_by_adapter": difference(found[QUANTISED], found[ADAPTED]),
        "rows": {
            name: {
                "perplexity": found[name].perplexity,
                "loss": found[name].mean_loss,
                "divergence": found[name].mean_divergence,
            }
            for name in (ORIGINAL, *variants)
        },
    }
    if rounding is not None:
        report["rounding"] = {"name": rounding.name, "bits_per_weight": rounding.bits_per_weight}
        report["adapter_over_rounding"] = difference(found[ROUNDED], found[ADAPTED])
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


def _terms(model: nn.Module, adapter: Adapter) -> LowRankTerms:
    like = model.get_input_embeddings().weight  # type: ignore[operator]
    terms = {}
    for name in adapter.layers:
        layer, factors = model.get_submodule(name), adapter.folded(name, like.dtype)
        terms[name] = (layer, factors.lora_b.to(device_of(layer)), factors.lora_a.to(device_of(layer)))
    return terms
