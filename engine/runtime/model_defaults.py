"""A model's generation_config: how its tokens are chosen where a request does not say."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopHLogitsWarper,
    TypicalLogitsWarper,
)

from longshadow.engine.runtime.sampling_params import SamplingParams

# What the engine does not do, and the values that mean nothing.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "guidance_scale": (None, 1),
    "watermarking_config": (None,),
    "forced_eos_token_id": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "token_healing": (None, False),
    "max_time": (None,),
}
# `top_p` 0 keeps the most likely token in transformers; `SamplingParams` wants it above 0.
LEAST_TOP_P = 1e-9

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """Choices of a model's makers; fields of `SamplingParams` that are None mean these.

    Args:
        temperature: 0, the most likely token, unless the model's `do_sample` is set.
        top_k: as the model names it; transformers' own 50, where it names none, is not the model's.
        max_tokens: None where it names none: as many as fit.
        stop: texts that end an answer.
        end_tokens: end-of-sequence tokens.
        source: the rest, which a request cannot change: bad words, suppressed tokens, typical_p, ...
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    end_tokens: tuple[int, ...] = ()
    source: GenerationConfig | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, end_tokens: Sequence[int]) -> "ModelDefaults":
        """Of this model. Raises ValueError for values out of range."""
        source = model.generation_config or GenerationConfig()  # type: ignore[no-untyped-call]
        texts = source.stop_strings or ()
        defaults = cls(
            temperature=_or(source.temperature, 1.0) if source.do_sample else 0.0,
            top_p=max(_or(source.top_p, 1.0), LEAST_TOP_P),
            top_k=_or(source.top_k, 0),
            min_p=_or(source.min_p, 0.0),
            repetition_penalty=_or(source.repetition_penalty, 1.0),
            max_tokens=source.max_new_tokens,
            min_tokens=_or(source.min_new_tokens, 0),
            stop=(texts,) if isinstance(texts, str) else tuple(texts),
            end_tokens=tuple(end_tokens),
            source=source,
        )
        try:
            defaults.fill(SamplingParams(max_tokens=None), room=1)
        except ValueError as error:
            raise ValueError(f"the model's generation_config cannot be used: {error}") from error
        return defaults

    def warn(self) -> None:
        """Says what the model asks for and the engine does not do."""
        for name, neutral in UNSUPPORTED.items():
            value = getattr(self.source, name, None)
            if value not in neutral:
                logger.warning("the model's generation_config has %s = %r, which is not supported here", name, value)

    def fill(self, params: SamplingParams, room: int) -> SamplingParams:
        """The same without None; `room`: tokens that fit after the prompt."""
        most = params.max_tokens
        if most is None:
            most = max(1, min(room, self.max_tokens or room))
        return dataclasses.replace(
            params,
            temperature=_or(params.temperature, self.temperature),
            top_p=_or(params.top_p, self.top_p),
            top_k=_or(params.top_k, self.top_k),
            min_p=_or(params.min_p, self.min_p),
            repetition_penalty=_or(params.repetition_penalty, self.repetition_penalty),
            stop=self.stop if params.stop is None else params.stops,
            max_tokens=most,
            min_tokens=min(self.min_tokens, most) if params.min_tokens is None else params.min_tokens,
        )

    def before_penalties(self) -> LogitsProcessorList:
        """The model's own, of those that transformers applies before the repetition penalty."""
        processors = LogitsProcessorList()
        if self.source is not None and self.source.sequence_bias is not None:
            processors.append(SequenceBiasLogitsProcessor(self.source.sequence_bias))
        return processors

    def after_penalties(self, num_prompt: int, device: torch.device) -> LogitsProcessorList:
        """The model's own, of those that transformers applies after the repetition penalty."""
        processors, source = LogitsProcessorList(), self.source
        if source is None:
            return processors
        ends: Any = torch.tensor(self.end_tokens, device=device) if self.end_tokens else None
        if source.no_repeat_ngram_size:
            processors.append(NoRepeatNGramLogitsProcessor(source.no_repeat_ngram_size))
        if source.bad_words_ids is not None:
            processors.append(NoBadWordsLogitsProcessor(source.bad_words_ids, ends))
        if source.min_length and ends is not None:
            processors.append(MinLengthLogitsProcessor(source.min_length, ends, device=str(device)))
        if source.remove_invalid_values:
            processors.append(InfNanRemoveLogitsProcessor())
        if source.exponential_decay_length_penalty is not None and ends is not None:
            processors.append(ExponentialDecayLengthPenalty(source.exponential_decay_length_penalty, ends, num_prompt))
        if source.suppress_tokens is not None:
            processors.append(SuppressTokensLogitsProcessor(source.suppress_tokens, device=str(device)))
        if source.begin_suppress_tokens is not None:
            processors.append(
                SuppressTokensAtBeginLogitsProcessor(source.begin_suppress_tokens, num_prompt, device=str(device))
            )
        return processors

    def before_top_k(self) -> LogitsProcessorList:
        """The model's own warper between temperature and top_k."""
        warpers = LogitsProcessorList()
        if self.source is not None and self.source.top_h is not None:
            warpers.append(TopHLogitsWarper(self.source.top_h))
        return warpers

    def after_min_p(self, device: torch.device) -> LogitsProcessorList:
        """The model's own warpers after all that requests can choose."""
        warpers, source = LogitsProcessorList(), self.source
        if source is None:
            return warpers
        if source.typical_p is not None and source.typical_p < 1:
            warpers.append(TypicalLogitsWarper(source.typical_p))
        if source.epsilon_cutoff is not None and 0 < source.epsilon_cutoff < 1:
            warpers.append(EpsilonLogitsWarper(source.epsilon_cutoff))
        if source.eta_cutoff is not None and 0 < source.eta_cutoff < 1:
            warpers.append(EtaLogitsWarper(source.eta_cutoff, device=str(device)))
        return warpers


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
