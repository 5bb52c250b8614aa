"""From logits to tokens: transformers' own processors, and random numbers of each completion's own.

Legend: B sequences, V vocabulary.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from longshadow.engine.runtime.model_defaults import ModelDefaults
from longshadow.engine.runtime.outputs import TokenLogprob
from longshadow.engine.runtime.sampling_params import SamplingParams

TokenText = Callable[[int], str]
Group = tuple[float | None, int | None, float | None, float | None]


class OccurrencePenalties(LogitsProcessor):
    """logit - frequency_penalty x count - presence_penalty x [count > 0], by the tokens of the answer so far."""

    def __init__(self, *, presence: float, frequency: float, num_prompt: int) -> None:
        self._presence, self._frequency, self._num_prompt = presence, frequency, num_prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids [1, prompt and answer], scores [1, V]."""
        counts = torch.zeros_like(scores)
        answer = input_ids[:, self._num_prompt :]
        counts.scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        penalised = scores - self._frequency * counts - self._presence * (counts > 0)
        return penalised  # type: ignore[return-value]


@dataclass(eq=False, kw_only=True)
class Sampler:
    """How one completion's tokens are chosen. Its random numbers depend on nothing but the seed and its index.

    Attributes:
        penalties: what looks at earlier tokens; applied to this completion alone.
        warpers: what does not; applied to all completions with the same parameters together.
    """

    params: SamplingParams
    random: random.Random
    penalties: LogitsProcessorList
    warpers: LogitsProcessorList
    tokens: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        *,
        index: int,
        prompt: list[int],
        end_tokens: Sequence[int],
        device: torch.device,
        defaults: ModelDefaults,
    ) -> "Sampler":
        """For completion `index` of a request, of whose parameters none is None; its logits are on `device`."""
        return cls(
            params=params,
            random=random.Random() if params.seed is None else random.Random(f"{params.seed}/{index}"),
            penalties=_penalties(params, len(prompt), end_tokens, device, defaults),
            warpers=_warpers(params, device, defaults),
            tokens=list(prompt),
        )

    @property
    def group(self) -> Group | None:
        """Completions of one group are warped together; None takes the most likely token."""
        params = self.params
        return None if params.is_greedy else (params.temperature, params.top_k, params.top_p, params.min_p)


def _penalties(
    params: SamplingParams, num_prompt: int, end_tokens: Sequence[int], device: torch.device, defaults: ModelDefaults
) -> LogitsProcessorList:
    processors = defaults.before_penalties()
    assert params.repetition_penalty is not None
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.presence_penalty or params.frequency_penalty:
        processors.append(
            OccurrencePenalties(
                presence=params.presence_penalty, frequency=params.frequency_penalty, num_prompt=num_prompt
            )
        )
    processors += defaults.after_penalties(num_prompt, device)
    if params.min_tokens and end_tokens:
        suppressed = torch.tensor(end_tokens, device=device)
        processors.append(MinNewTokensLengthLogitsProcessor(num_prompt, params.min_tokens, suppressed))
    return processors


def _warpers(params: SamplingParams, device: torch.device, defaults: ModelDefaults) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if params.is_greedy:
        return warpers
    assert params.temperature is not None and params.top_k is not None
    assert params.top_p is not None and params.min_p is not None
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(params.temperature)))
    warpers += defaults.before_top_k()
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(float(params.top_p)))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(float(params.min_p)))
    warpers += defaults.after_min_p(device)
    return warpers


def choose_tokens(logits_BV: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | Exception]:
    """The next token of each sampler, from its row of logits, or why it has none: that is no matter of the others.

    A sampled token is the one at which the cumulated probability first exceeds the completion's next random number.
    """
    uniforms = [0.0 if sampler.params.is_greedy else sampler.random.random() for sampler in samplers]
    chosen: list[int | Exception] = []
    try:
        chosen += _choose(logits_BV, samplers, uniforms)
    except Exception:
        for row, sampler, uniform in zip(logits_BV.split(1), samplers, uniforms, strict=True):
            try:
                chosen += _choose(row, [sampler], [uniform])
            except Exception as error:
                chosen.append(error)
    for sampler, token in zip(samplers, chosen, strict=True):
        if isinstance(token, int):
            sampler.tokens.append(token)
    return chosen


def _choose(logits_BV: torch.Tensor, samplers: Sequence[Sampler], uniforms: Sequence[float]) -> list[int]:
    scores_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    processed = [
        sampler.penalties(_ids(sampler, scores), scores)[0] if sampler.penalties else scores[0]
        for sampler, scores in zip(samplers, scores_BV.split(1), strict=True)
    ]
    groups: dict[Group | None, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler.group, []).append(row)
    chosen = [0] * len(samplers)
    for group, rows in groups.items():
        scores = torch.stack([processed[row] for row in rows])
        if group is None:
            tokens = scores.argmax(1)
        else:
            warped = samplers[rows[0]].warpers(None, scores)  # type: ignore[arg-type]
            tokens = _draw(warped, [uniforms[row] for row in rows])
        for row, token in zip(rows, tokens.tolist(), strict=True):
            chosen[row] = token
    return chosen


def _ids(sampler: Sampler, scores: torch.Tensor) -> torch.LongTensor:
    ids: torch.LongTensor = torch.tensor([sampler.tokens], device=scores.device)  # type: ignore[assignment]
    return ids


def _draw(scores_BV: torch.Tensor, uniforms: list[float]) -> torch.Tensor:
    cumulated = scores_BV.double().softmax(1).cumsum(1)
    wanted = torch.tensor(uniforms, dtype=torch.float64, device=scores_BV.device).unsqueeze(1) * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, wanted, right=True).squeeze(1)
    # Rounding may leave the very last step flat: the last token with any probability then stands for it.
    last = scores_BV.shape[1] - 1 - (scores_BV.flip(1) > -torch.inf).int().argmax(1)
    return torch.minimum(found, last)


def log_probabilities(logits_V: torch.Tensor, token: int, num_top: int, token_text: TokenText) -> TokenLogprob:
    """Of a chosen token and the most likely ones, under the model's own distribution."""
    values = (logits_V if logits_V.dtype == torch.float64 else logits_V.float()).log_softmax(0)
    own = values[token]
    top = values.topk(min(num_top, values.numel())) if num_top else None
    return TokenLogprob(
        token_id=token,
        logprob=float(own),
        rank=int((values > own).sum()) + 1,
        token=token_text(token),
        top=()
        if top is None
        else tuple(
            (place, token_text(place), value)
            for place, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ),
    )
