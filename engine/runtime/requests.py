"""A request as the engine works on it: its completions, their text, and who hears of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from longshadow.engine.runtime.documents import Document
from longshadow.engine.runtime.memory import Bytes
from longshadow.engine.runtime.model_defaults import ModelDefaults
from longshadow.engine.runtime.outputs import (
    CompletionOutput,
    FinishReason,
    RequestMetrics,
    RequestOutput,
    TokenLogprob,
)
from longshadow.engine.runtime.sampling import Sampler, log_probabilities
from longshadow.engine.runtime.sampling_params import SamplingParams
from longshadow.engine.runtime.scheduler import Job
from longshadow.engine.runtime.state import SequenceState
from longshadow.engine.runtime.text import TextStream


@dataclass(eq=False, kw_only=True)
class Completion:
    """One answer to a prompt."""

    index: int
    params: SamplingParams
    sampler: Sampler
    text: TextStream
    end_tokens: frozenset[int]
    tokenizer: PreTrainedTokenizerBase | None
    state: SequenceState | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def accept(self, token: int, logits_V: torch.Tensor) -> None:
        """Takes the next token, and ends where it says so."""
        params = self.params
        self.token_ids.append(token)
        if params.logprobs is not None:
            self.logprobs.append(log_probabilities(logits_V, token, params.logprobs, self._token_text))
        assert params.min_tokens is not None
        may_stop = len(self.token_ids) >= params.min_tokens
        if may_stop and token in (params.stop_token_ids or ()):
            self.finish("stop", token)
        elif may_stop and not params.ignore_eos and token in self.end_tokens:
            self.finish("stop", None)
        elif (stop := self.text.add(token, may_stop=may_stop)) is not None:
            self.finish("stop", stop)
        elif len(self.token_ids) == params.max_tokens:
            self.finish("length", None)

    def finish(self, reason: FinishReason, stop: str | int | None) -> None:
        """Nothing more is coming; its sequence is let go."""
        if not isinstance(stop, str):
            self.text.finish()
        self.drop()
        self.finish_reason, self.stop_reason = reason, stop

    def drop(self) -> None:
        """Lets its sequence go."""
        if self.state is not None:
            self.state.release()
        self.state = None

    def output(self) -> CompletionOutput:
        """As far as it is."""
        return CompletionOutput(
            index=self.index,
            text=self.text.text,
            token_ids=list(self.token_ids),
            logprobs=None if self.params.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _token_text(self, token: int) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode([token]))


Sink = Callable[[RequestOutput | Exception], None]


@dataclass(eq=False, kw_only=True)
class Request(Job):
    """A prompt, its parameters and its completions.

    Attributes:
        sink: called from the engine's thread with outputs or, at last, an error.
        streams: whether the sink wants every step's output or the last one only.
        state: the prompt's sequence while it is read.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    completions: list[Completion]
    document: Document | None = None
    sink: Sink = lambda item: None
    streams: bool = False
    state: SequenceState | None = None
    keeps_head: bool = False
    is_cancelled: bool = False
    num_cached_tokens: int = 0
    arrival: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def max_tokens(self) -> int:
        """The longest it can get, its document included."""
        history = 0 if self.document is None else self.document.num_tokens
        assert self.params.max_tokens is not None
        return history + len(self.prompt) + self.params.max_tokens

    @property
    def is_finished(self) -> bool:
        """Whether every completion has ended."""
        return all(completion.finish_reason is not None for completion in self.completions)

    def cancel(self) -> None:
        """Ends what has not ended."""
        for completion in self.completions:
            if completion.finish_reason is None:
                completion.finish("cancelled", None)

    def output(self) -> RequestOutput:
        """As far as it is."""
        return RequestOutput(
            request_id=self.id,
            prompt_token_ids=self.prompt,
            outputs=[completion.output() for completion in self.completions],
            finished=self.is_finished,
            num_cached_tokens=self.num_cached_tokens,
            metrics=RequestMetrics(
                arrival=self.arrival,
                first_token=self.first_token,
                finished=self.finished,
                queue_seconds=None if self.admitted is None else self.admitted - self.arrival,
            ),
        )


def make_completions(
    params: SamplingParams,
    prompt: list[int],
    tokenizer: PreTrainedTokenizerBase | None,
    defaults: ModelDefaults,
    device: torch.device,
) -> list[Completion]:
    """`params.n` completions without tokens, whose logits will be on `device`; no parameter is None."""
    suppressed = [*(params.stop_token_ids or ()), *(() if params.ignore_eos else defaults.end_tokens)]
    return [
        Completion(
            index=index,
            params=params,
            sampler=Sampler.of(
                params, index=index, prompt=prompt, end_tokens=suppressed, device=device, defaults=defaults
            ),
            text=TextStream(tokenizer, params.stops),
            end_tokens=frozenset(defaults.end_tokens),
            tokenizer=tokenizer,
        )
        for index in range(params.n)
    ]


@dataclass(eq=False, kw_only=True)
class Reading(Job):
    """A document that is being read.

    Attributes:
        build: makes the document from its state and what is reserved for it.
        document: once it has been read.
        sink: called from the engine's thread with (tokens read, all tokens), the document, or an error.
    """

    tokens: list[int]
    build: Callable[[SequenceState, Bytes], Document]
    sink: Callable[[tuple[int, int] | Document | Exception], None]
    state: SequenceState | None = None
    document: Document | None = None
    is_cancelled: bool = False
