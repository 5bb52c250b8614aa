"""What a compensation bought, on text that it never saw: divergence from the original, and perplexity."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from longshadow.compress.blocks import LowRankTerms, compensated

RESAMPLES = 2000
ORIGINAL = "original"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of a model against the original, one entry per sample; means over the tokens of it.

    Attributes:
        divergence: KL of the next token's distribution from the original's, in nats.
        loss: of the next token, in nats.
    """

    divergence: tuple[float, ...]
    loss: tuple[float, ...]

    @property
    def mean_divergence(self) -> float:
        """Over all samples."""
        return sum(self.divergence) / len(self.divergence)

    @property
    def mean_loss(self) -> float:
        """Over all samples."""
        return sum(self.loss) / len(self.loss)

    @property
    def perplexity(self) -> float | None:
        """exp of the mean loss; None where no number holds it."""
        try:
            return math.exp(self.mean_loss)
        except OverflowError:
            return None


@dataclass(frozen=True, eq=False, kw_only=True)
class Variant:
    """A model to compare with the original, with low-rank terms added to its layers."""

    model: nn.Module
    added: LowRankTerms = field(default_factory=dict)


@torch.no_grad()
def log_probabilities(model: nn.Module, sample: torch.Tensor) -> torch.Tensor:
    """Of the next token, [length - 1, vocabulary] in fp32, for token ids [length]."""
    logits: torch.Tensor = model(input_ids=sample.unsqueeze(0), use_cache=False).logits
    return logits[0, :-1].float().log_softmax(-1)


def qualities(
    original: nn.Module,
    variants: Mapping[str, Variant],
    samples: torch.Tensor,
    on_sample: Callable[[int, int], None] | None = None,
) -> dict[str, Quality]:
    """Of each variant, and of the original under "original", on token ids [samples, length].

    All of them on one sample after the other, so that the original runs once. `on_sample` is called with the number of
    samples that are done and of all.
    """
    found: dict[str, list[Quality]] = {name: [] for name in (ORIGINAL, *variants)}
    if on_sample is not None:
        on_sample(0, len(samples))
    for number, sample in enumerate(samples, 1):
        expected, one = [log_probabilities(original, sample)], sample.unsqueeze(0)
        found[ORIGINAL].append(own_quality(expected, one))
        for name, variant in variants.items():
            with compensated(variant.added):
                found[name].append(quality_against(expected, variant.model, one))
        if on_sample is not None:
            on_sample(number, len(samples))
    return {
        name: Quality(
            divergence=tuple(value for part in parts for value in part.divergence),
            loss=tuple(value for part in parts for value in part.loss),
        )
        for name, parts in found.items()
    }


def quality_against(expected: Iterable[torch.Tensor], model: nn.Module, samples: torch.Tensor) -> Quality:
    """Of `model`, where the original's log-probabilities of each sample are known."""
    divergence, loss = [], []
    for reference, sample in zip(expected, samples, strict=True):
        actual = log_probabilities(model, sample)
        divergence.append(float(F.kl_div(actual, reference, reduction="none", log_target=True).sum(-1).mean()))
        loss.append(float(F.nll_loss(actual, sample[1:])))
    return Quality(divergence=tuple(divergence), loss=tuple(loss))


def own_quality(expected: Iterable[torch.Tensor], samples: torch.Tensor) -> Quality:
    """Of the original itself."""
    loss = tuple(float(F.nll_loss(reference, sample[1:])) for reference, sample in zip(expected, samples, strict=True))
    return Quality(divergence=(0.0,) * len(loss), loss=loss)


def difference(worse: Quality, better: Quality) -> dict[str, float]:
    """By how many nats the divergence of `better` is smaller, paired by samples: `mean`, `low` and `high`.

    The latter are the mean's 95 % interval; one sample has none, and they are left out.
    """
    values = [old - new for old, new in zip(worse.divergence, better.divergence, strict=True)]
    if len(values) < 2:
        return {"mean": values[0]}
    mean, low, high = mean_and_interval(values)
    return {"mean": mean, "low": low, "high": high}


def mean_and_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """The mean, and the 95 % interval of the mean by resampling; for paired comparisons give differences."""
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(data), (RESAMPLES, len(data)), generator=generator)
    means = data[picked].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(data.mean()), low, high
