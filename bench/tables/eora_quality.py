"""What low-rank compensation wins back on real weights, against other methods and against spending bytes on bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from bench.prose import language_reference, library_docstrings
from bench.quantisers import Quantiser, RoundToNearest, TwoOfFour, num_block_weights, quantised
from bench.record import Check, Row
from bench.session import Session
from bench.synthetic import num_threads
from bench.table import Column, Outcome, Table
from longshadow.compress.blocks import compensated
from longshadow.compress.calibration import Splits, split_blocks
from longshadow.compress.evaluation import mean_and_interval, quality
from longshadow.compress.pipeline import Compensation, compensate
from longshadow.compress.solver import Method
from longshadow.models import load_model

NONE = "none"
CHECK_TOLERANCE = 1e-3
PARAGRAPHS_OF_A_DOCUMENT = 20


@dataclass(frozen=True, kw_only=True)
class Config:
    """`rounding` are pairs of bits and group; `alone` are quantised but not compensated, to compare bytes with."""

    rounding: tuple[tuple[int, int], ...] = ((3, 64), (3, 32), (2, 32))
    pruned: bool = True
    alone: tuple[tuple[int, int], ...] = ((4, 64), (3, 16), (2, 16))
    ranks: tuple[int, ...] = (16, 32, 64)
    methods: tuple[Method, ...] = ("eora", "diagonal", "svd")
    length: int = 512
    samples: int = 48
    report_samples: int = 12
    threads: int = 2


def run(config: Config, session: Session) -> Outcome:
    """Each quantiser alone, then compensated by every method and rank."""
    with num_threads(config.threads):
        session.progress("loading")
        loaded = load_model("demo", dtype=torch.float32, device=session.device)
        splits = text_blocks(loaded.tokenizer, config, session.device)
        check = check_full_rank(loaded.model, splits.calibration[:1])
        rows: list[Row] = []
        original = quality(loaded.model, loaded.model, splits.report)
        rows.append({"quantiser": "none", "method": NONE, "perplexity": original.perplexity})
        quantisers: list[Quantiser] = [RoundToNearest(bits=bits, group=group) for bits, group in config.rounding]
        quantisers += [TwoOfFour()] if config.pruned else []
        for quantiser in quantisers:
            rows += of_quantiser(loaded.model, quantiser, splits, config, session)
        for bits, group in config.alone:
            alone = RoundToNearest(bits=bits, group=group)
            rows.append(_alone(loaded.model, alone, splits, session)[0])
    return Outcome(rows=rows, check=check)


def text_blocks(tokenizer: Any, config: Config, device: str) -> Splits:
    """Python's documentation, a dozen paragraphs to a document, dealt out to the parts."""
    paragraphs = (language_reference() + "\n\n" + library_docstrings()).split("\n\n")
    documents = [
        "\n\n".join(paragraphs[start : start + PARAGRAPHS_OF_A_DOCUMENT])
        for start in range(0, len(paragraphs), PARAGRAPHS_OF_A_DOCUMENT)
    ]
    blocks = split_blocks(tokenizer, documents, length=config.length, samples=config.samples)
    return Splits(
        calibration=blocks.calibration.to(device),
        selection=blocks.selection.to(device),
        report=blocks.report[: config.report_samples].to(device),
    )


def of_quantiser(model: nn.Module, quantiser: Quantiser, splits: Splits, config: Config, session: Session) -> list[Row]:
    """The quantiser alone, and its compensations; each is a unit that an interrupted run does not repeat."""
    alone, divergences = _alone(model, quantiser, splits, session)
    rows = [alone]
    for method in config.methods:
        for rank in config.ranks:
            key = f"{quantiser.name}, {method}, {rank}"
            session.progress(key)
            unit = session.unit(key, lambda m=method, r=rank: _compensated(model, quantiser, splits, m, r))
            removed = [old - new for old, new in zip(divergences, unit["divergences"], strict=True)]
            mean, low, high = mean_and_interval(removed)
            before = sum(divergences) / len(divergences)
            rows.append(
                {
                    "quantiser": quantiser.name,
                    "method": method,
                    "rank": rank,
                    "bits": quantiser.bits_per_weight + 16 * unit["num_weights"] / num_block_weights(model),
                    "perplexity": unit["perplexity"],
                    "divergence": before - mean,
                    "recovered": mean / before,
                    "low": low / before,
                    "high": high / before,
                }
            )
    return rows


def _alone(model: nn.Module, quantiser: Quantiser, splits: Splits, session: Session) -> tuple[Row, list[float]]:
    def measure() -> dict[str, Any]:
        found = quality(model, quantised(model, quantiser), splits.report)
        return {"perplexity": found.perplexity, "divergences": list(found.divergence)}

    session.progress(f"{quantiser.name}, alone")
    unit = session.unit(f"{quantiser.name}, alone", measure)
    divergences = cast("list[float]", unit["divergences"])
    row: Row = {
        "quantiser": quantiser.name,
        "method": NONE,
        "bits": quantiser.bits_per_weight,
        "perplexity": unit["perplexity"],
        "divergence": sum(divergences) / len(divergences),
    }
    return row, divergences


def _compensated(model: nn.Module, quantiser: Quantiser, splits: Splits, method: Method, rank: int) -> dict[str, Any]:
    smaller = quantised(model, quantiser)
    result = compensate(model, smaller, splits.calibration, rank=rank, method=method)
    with compensated(_hooks(smaller, result)):
        found = quality(model, smaller, splits.report)
    return {
        "perplexity": found.perplexity,
        "divergences": list(found.divergence),
        "num_weights": result.num_weights,
    }


def _hooks(model: nn.Module, result: Compensation) -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    return {
        name: (model.get_submodule(name), pair.lora_b.float(), pair.lora_a.float())
        for name, pair in result.factors.items()
    }


def check_full_rank(model: nn.Module, samples: torch.Tensor) -> Check:
    """Compensated at full rank, a 2-bit model must give the original's logits."""
    smaller = quantised(model, RoundToNearest(bits=2, group=32))
    result = compensate(model, smaller, samples, rank=10**6, dtype=torch.float32)
    with torch.no_grad(), compensated(_hooks(smaller, result)):
        actual, expected = smaller(samples).logits, model(samples).logits
    error = float((actual - expected).abs().max() / expected.abs().max())
    return Check(
        passed=error <= CHECK_TOLERANCE,
        max_error=error,
        text="logits of a 2-bit model compensated at full rank against the original's, largest difference / largest "
        f"logit = {error:.1e} (at most {CHECK_TOLERANCE:.0e})",
    )


def _quick(config: Config) -> Config:
    return replace(
        config, rounding=((3, 64),), pruned=False, alone=(), ranks=(16,), methods=("eora", "svd"), samples=6, length=256
    )


TABLE: Table = Table(
    name="eora_quality",
    title="What compensation wins back",
    about="SmolLM2-135M-Instruct (real weights, which come from a 4-bit grid of groups of 32; that grid is left out), "
    "linear layers of all blocks rounded to nearest or pruned, compensated with bf16 factors calibrated on Python's "
    "documentation, block after compensated block; divergence (KL of the next token from the original's) and "
    "perplexity on documents that were not calibrated on, with the 95 % interval of what is recovered, resampled over "
    "samples. Bits per weight count scales and the adapter's factors; quantisers alone stand beside for what the same "
    "bits buy without an adapter.",
    configs={"cpu": Config(), "cuda": Config()},
    quick=_quick,
    columns=(
        Column(key="quantiser", heading="quantiser"),
        Column(key="method", heading="method"),
        Column(key="rank", heading="rank", unit="count"),
        Column(key="bits", heading="bits per weight"),
        Column(key="perplexity", heading="perplexity", digits=3),
        Column(key="divergence", heading="divergence", digits=4),
        Column(key="recovered", heading="recovered", unit="%"),
        Column(key="low", heading="from", unit="%"),
        Column(key="high", heading="to", unit="%"),
    ),
    targets=(),
    run=run,
)
