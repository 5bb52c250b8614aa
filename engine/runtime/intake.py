"""From what a caller gives to a request that the engine can admit, or one line about why it cannot."""

import secrets
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from longshadow.engine.runtime.accounting import Accounting
from longshadow.engine.runtime.documents import Document
from longshadow.engine.runtime.errors import RequestTooLong
from longshadow.engine.runtime.outputs import RequestOutput
from longshadow.engine.runtime.requests import Request, make_completions
from longshadow.engine.runtime.sampling_params import SamplingParams

Prompt = str | list[int]


@dataclass(frozen=True, eq=False, kw_only=True)
class Intake:
    """Checks prompts and parameters against a model's and an engine's limits."""

    tokenizer: PreTrainedTokenizerBase | None
    end_tokens: tuple[int, ...]
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    accounting: Accounting
    device: torch.device

    def need_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises ValueError, saying what for, where there is none."""
        if self.tokenizer is None:
            raise ValueError(f"this engine has no tokenizer for {what}: give token ids, or the LLM a tokenizer")
        return self.tokenizer

    def check_tokens(self, tokens: list[int]) -> None:
        """Raises ValueError unless these are some of the model's tokens."""
        if not tokens:
            raise ValueError("a prompt needs at least one token")
        for token in tokens:
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(f"token ids must be whole numbers between 0 and {self.vocab_size - 1}, got {token!r}")

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        document: Document | None,
        sink: Callable[[RequestOutput | Exception], None],
    ) -> Request:
        """A request that goes on from `document`. Raises ValueError, or RequestTooLong for one that is too long."""
        if isinstance(prompt, str):
            # What follows a document is not the beginning of a text.
            encoded = self.need_tokenizer("texts")(prompt, add_special_tokens=document is None)
            prompt = list(encoded.input_ids)
        self.check_tokens(prompt)
        if params.stops:
            self.need_tokenizer("stop texts")
        if params.n > self.max_num_seqs:
            raise ValueError(f"n must be at most max_num_seqs = {self.max_num_seqs}, got {params.n}")
        start = None if document is None else document.state.start
        history = 0 if document is None else document.num_tokens
        total = history + len(prompt) + params.max_tokens
        if total > self.max_model_len:
            before = f"the document's {history:,} tokens, " if document is not None else ""
            raise RequestTooLong(
                f"{before}the prompt's {len(prompt):,} and max_tokens = {params.max_tokens:,} make {total:,}, but "
                f"{self.max_model_len:,} fit"
            )
        # The last token is never cached.
        need = self.accounting.need(len(prompt), params.max_tokens - 1, start=start, num_completions=params.n)
        return Request(
            num_prompt=len(prompt),
            num_slots=params.n,
            need=need,
            id=f"request-{secrets.token_hex(12)}",
            prompt=prompt,
            params=params,
            completions=make_completions(params, prompt, self.tokenizer, self.end_tokens, self.device),
            document=document,
            sink=sink,
        )


def as_prompts(prompts: Prompt | Sequence_[Prompt]) -> list[Prompt]:
    """Always a list; a list of integers is one prompt. Raises ValueError for anything else than texts and lists."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise ValueError(f"prompts must be texts or lists of token ids, got {type(prompts).__name__}; use .tolist()")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [list(prompts)]
    return list(prompts)


def as_params(params: SamplingParams | Sequence_[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One for each prompt. Raises ValueError when their numbers differ."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(
            f"there are {count} prompts and {len(params)} sampling_params; give one for each, or one for all"
        )
    return list(params)
