"""What a compensation bought, on text that it never saw: divergence from the original, and perplexity."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

RESAMPLES = 2000


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
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(sum(self.loss) / len(self.loss))


@torch.no_grad()
def log_probabilities(model: nn.Module, sample: torch.Tensor) -> torch.Tensor:
    """Of the next token, [length - 1, vocabulary] in fp32, for token ids [length]."""
    logits: torch.Tensor = model(input_ids=sample.unsqueeze(0), use_cache=False).logits
    return logits[0, :-1].float().log_softmax(-1)


def quality(original: nn.Module, model: nn.Module, samples: torch.Tensor) -> Quality:
    """Of `model` on token ids [samples, length]; of the original itself, the divergence is 0."""
    expected = (log_probabilities(original, sample) for sample in samples)
    return quality_against(expected, model, samples) if model is not original else own_quality(expected, samples)


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


def mean_and_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """The mean, and the 95 % interval of the mean by resampling; for paired comparisons give differences."""
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(data), (RESAMPLES, len(data)), generator=generator)
    means = data[picked].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(data.mean()), low, high
