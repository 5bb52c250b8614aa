"""What judges a compensation: text that nothing was calibrated on, and a full-rank one, which must be exact."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.eora_candidates import Candidate
from bench.prose import language_reference, library_docstrings
from bench.quantisers import quantised
from bench.record import Check
from longshadow.compress.blocks import compensated, decoder_blocks
from longshadow.compress.calibration import Splits, split_blocks
from longshadow.compress.evaluation import Quality, log_probabilities, quality_against
from longshadow.compress.pipeline import compensate
from longshadow.compress.rounding import RoundToNearest

PARAGRAPHS_OF_A_DOCUMENT = 20
CHECK_TOLERANCE = 1e-3
CHECKED_BLOCKS = 2


@dataclass(eq=False, kw_only=True)
class Judges:
    """Texts that nothing was calibrated on, and what the original says of them."""

    selection: torch.Tensor
    report: torch.Tensor
    of_selection: list[torch.Tensor]
    of_report: list[torch.Tensor]

    def judge(self, model: nn.Module) -> tuple[Quality, Quality]:
        """On the text for choosing, and on that for the report."""
        return (
            quality_against(self.of_selection, model, self.selection),
            quality_against(self.of_report, model, self.report),
        )


def text_blocks(tokenizer: Any, *, length: int, samples: int) -> Splits:
    """Python's documentation, a dozen paragraphs to a document, dealt out to the parts, in blocks of `length`."""
    paragraphs = (language_reference() + "\n\n" + library_docstrings()).split("\n\n")
    documents = [
        "\n\n".join(paragraphs[start : start + PARAGRAPHS_OF_A_DOCUMENT])
        for start in range(0, len(paragraphs), PARAGRAPHS_OF_A_DOCUMENT)
    ]
    return split_blocks(tokenizer, documents, length=length, samples=samples)


@torch.no_grad()
def judges_of(model: nn.Module, splits: Splits, *, length: int, num_selection: int, num_report: int) -> Judges:
    """Blocks of the judging parts, cut shorter, so that there are more of them to compare."""
    selection = splits.selection.view(-1, length)[:num_selection]
    report = splits.report.view(-1, length)[:num_report]
    return Judges(
        selection=selection,
        report=report,
        of_selection=[log_probabilities(model, sample) for sample in selection],
        of_report=[log_probabilities(model, sample) for sample in report],
    )


def hooks(model: nn.Module, candidate: Candidate) -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """What `compensated` adds to a model for a candidate."""
    return {
        name: (model.get_submodule(name), pair.lora_b.float(), pair.lora_a.float()) for name, pair in candidate.items()
    }


def check_full_rank(model: nn.Module, samples: torch.Tensor) -> Check:
    """Compensated at full rank, the model's first blocks in 2 bits must give the logits of its first blocks."""
    shallow = first_blocks(model, CHECKED_BLOCKS)
    smaller = quantised(shallow, RoundToNearest(bits=2, group=32))
    result = compensate(shallow, smaller, samples, rank=10**6, dtype=torch.float32)
    with torch.no_grad(), compensated(hooks(smaller, result.factors)):
        actual, expected = smaller(samples).logits, shallow(samples).logits
    error = float((actual - expected).abs().max() / expected.abs().max())
    return Check(
        passed=error <= CHECK_TOLERANCE,
        max_error=error,
        text=f"logits of the first {CHECKED_BLOCKS} blocks in 2 bits, compensated at full rank, against their own, "
        f"largest difference / largest logit = {error:.1e} (at most {CHECK_TOLERANCE:.0e})",
    )


def first_blocks(model: nn.Module, count: int) -> nn.Module:
    """A copy of the model that ends after so many decoder blocks; head and embeddings stay."""
    shallow = copy.deepcopy(model)
    del decoder_blocks(shallow)[count:]
    shallow.config.num_hidden_layers = count
    return shallow
