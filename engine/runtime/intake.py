"""From what a caller gives to a request that the engine can admit, or one line about why it cannot."""

import functools
import operator
import secrets
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from typing import SupportsIndex, TypeGuard

import torch
from transformers import PreTrainedTokenizerBase

from longshadow.engine.runtime.accounting import Accounting, Need
from longshadow.engine.runtime.documents import Document
from longshadow.engine.runtime.errors import RequestTooLong, context_exceeded
from longshadow.engine.runtime.model_defaults import ModelDefaults
from longshadow.engine.runtime.outputs import RequestOutput
from longshadow.engine.runtime.requests import Request, make_completions
from longshadow.engine.runtime.sampling_params import SamplingParams, check_unicode
from longshadow.engine.runtime.shapes import Start
from longshadow.engine.runtime.token_bound import TokenBound

Prompt = str | list[int]

# Where a request leaves its length open, this much of it comes before room for others.
LEAST_OPEN_TOKENS = 1024


@dataclass(frozen=True, eq=False, kw_only=True)
class Intake:
    """Checks prompts and parameters against a model's and an engine's limits.

    Args:
        could_admit: whether the memory would do for so many requests, each with a need and a number of completions, if
            no other ran.
    """

    tokenizer: PreTrainedTokenizerBase | None
    defaults: ModelDefaults
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    accounting: Accounting
    could_admit: Callable[[Need, int, int], bool]
    device: torch.device

    def need_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises ValueError, saying what for, where there is none."""
        if self.tokenizer is None:
            raise ValueError(f"this engine has no tokenizer for {what}: give token ids, or the LLM a tokenizer")
        return self.tokenizer

    def check_text(self, text: str, *, history: int = 0, answer: int = 1) -> None:
        """Refuses a text that is surely too long, before it is tokenised.

        Raises:
            RequestTooLong: not even `answer` tokens would fit behind it, and behind `history` tokens of a document.
        """
        room = self.max_model_len - history - answer
        least = self._least_tokens(text, room)
        if least > room:
            raise context_exceeded(self.max_model_len, prompt=least, answer=answer, document=history, at_least=True)

    def check_document(self, text: str) -> None:
        """The same for a document. Raises RequestTooLong when a question and an answer would not fit."""
        least = self._least_tokens(text, self.max_model_len)
        if least > self.max_model_len - 2:
            raise RequestTooLong(
                f"the document has at least {least:,} tokens; with a question and an answer {self.max_model_len:,} fit"
            )

    def _least_tokens(self, text: str, enough: int) -> int:
        # A token has at least a byte, so a short text need not be looked at.
        if len(text) <= enough or self._bound is None:
            return 0
        return self._bound.least_tokens([text], enough)

    @functools.cached_property
    def _bound(self) -> TokenBound | None:
        return None if self.tokenizer is None else TokenBound.of(self.tokenizer)

    def tokens(self, prompt: object, *, is_beginning: bool) -> list[int]:
        """Token ids of a text or of token ids. Raises ValueError for anything else, and for none."""
        if isinstance(prompt, str):
            check_unicode("prompt", prompt)
            # What follows a document is not the beginning of a text.
            prompt = list(self.need_tokenizer("texts")(prompt, add_special_tokens=is_beginning).input_ids)
        return self.checked_tokens(prompt)

    def checked_tokens(self, tokens: object) -> list[int]:
        """The same as plain integers. Raises ValueError unless these are some of the model's tokens."""
        if not isinstance(tokens, list | tuple):
            raise ValueError(f"a prompt must be a text or a list of token ids, got {_kind(tokens)}")
        if not tokens:
            raise ValueError("a prompt needs at least one token")
        return [self._token(token) for token in tokens]

    def _token(self, token: object) -> int:
        # A bool is an int to Python, and numpy's integers are none.
        number = None if isinstance(token, bool) or not _is_integer(token) else operator.index(token)
        if number is None or not 0 <= number < self.vocab_size:
            got = repr(token) if isinstance(token, int | float) else _kind(token)
            raise ValueError(f"token ids must be whole numbers between 0 and {self.vocab_size - 1}, got {got}")
        return number

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        document: Document | None,
        sink: Callable[[RequestOutput | Exception], None],
    ) -> Request:
        """A request that goes on from `document`. Raises ValueError, or RequestTooLong for one that is too long."""
        if document is not None:
            check_document(document)
        history = 0 if document is None else document.num_tokens
        if isinstance(prompt, str):
            self.check_text(prompt, history=history, answer=params.max_tokens or 1)
        tokens = self.tokens(prompt, is_beginning=document is None)
        if params.n > self.max_num_seqs:
            raise ValueError(f"n must be at most max_num_seqs = {self.max_num_seqs}, got {params.n}")
        for token in params.stop_token_ids or ():
            if token >= self.vocab_size:
                raise ValueError(f"stop_token_ids must be below {self.vocab_size}, the model's tokens, got {token}")
        start = None if document is None else document.state.start
        room = self.max_model_len - history - len(tokens)
        filled = self._fill(params, len(tokens), start, room)
        assert filled.max_tokens is not None
        if filled.stops:
            self.need_tokenizer("stop texts")
        if filled.max_tokens > room:
            raise context_exceeded(self.max_model_len, prompt=len(tokens), answer=filled.max_tokens, document=history)
        return Request(
            num_prompt=len(tokens),
            num_slots=filled.n,
            need=self._need(filled, len(tokens), start),
            id=f"request-{secrets.token_hex(12)}",
            prompt=tokens,
            params=filled,
            completions=make_completions(filled, tokens, self.tokenizer, self.defaults, self.device),
            document=document,
            sink=sink,
        )

    def _need(self, params: SamplingParams, num_prompt: int, start: Start | None) -> Need:
        assert params.max_tokens is not None
        # The last token is never cached.
        return self.accounting.need(num_prompt, params.max_tokens - 1, start=start, num_completions=params.n)

    def _fill(self, params: SamplingParams, num_prompt: int, start: Start | None, room: int) -> SamplingParams:
        """Parameters with the model's defaults.

        A length that they leave open becomes what fits into the context, as far as memory allows as many such requests
        as can run at once: one alone would otherwise reserve memory, which it hardly ever uses, that others wait for.
        """
        filled = self.defaults.fill(params, room)
        if params.max_tokens is not None:
            return filled
        assert filled.max_tokens is not None
        most = filled.max_tokens

        def fits(num_tokens: int, num_requests: int) -> bool:
            need = self._need(self.defaults.fill(params, num_tokens), num_prompt, start)
            return self.could_admit(need, filled.n, num_requests)

        num_tokens = _largest(most, lambda count: fits(count, max(1, self.max_num_seqs // filled.n)))
        least = min(most, LEAST_OPEN_TOKENS)
        if num_tokens < least:
            num_tokens = _largest(least, lambda count: fits(count, 1))
        return self.defaults.fill(params, num_tokens)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits; 1 where none does."""
    if fits(most):
        return most
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def as_prompts(prompts: Prompt | Sequence_[Prompt]) -> list[Prompt]:
    """Always a list; a list of integers is one prompt. Raises ValueError for anything else than texts and lists."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        hint = "; use .tolist()" if hasattr(prompts, "tolist") else ""
        raise ValueError(f"prompts must be texts or lists of token ids, got {_kind(prompts)}{hint}")
    if prompts and all(_is_integer(item) for item in prompts):
        return [list(prompts)]
    if any(isinstance(item, dict) for item in prompts):
        raise ValueError("messages are no prompts; give what `chat_prompt` makes of them")
    return list(prompts)


def as_params(params: SamplingParams | Sequence_[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One for each prompt. Raises ValueError for anything else, and when their numbers differ."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple) or not all(isinstance(one, SamplingParams) for one in params):
        raise ValueError(f"sampling_params must be SamplingParams, or a list of them, got {_kind(params)}")
    if len(params) != count:
        raise ValueError(
            f"there are {count} prompts and {len(params)} sampling_params; give one for each, or one for all"
        )
    return list(params)


def check_document(document: object) -> None:
    """Raises ValueError for anything else."""
    if not isinstance(document, Document):
        raise ValueError(f"document must be one that add_document or load_document gave, got {_kind(document)}")


def _is_integer(value: object) -> TypeGuard[SupportsIndex]:
    # Arrays and tensors of one element have an index, too.
    return hasattr(value, "__index__") and not getattr(value, "shape", ())


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
