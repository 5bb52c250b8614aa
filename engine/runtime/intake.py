"""From what a caller gives to a request that the engine can admit, or one line about why it cannot."""

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
from longshadow.engine.runtime.errors import RequestTooLong
from longshadow.engine.runtime.model_defaults import ModelDefaults
from longshadow.engine.runtime.outputs import RequestOutput
from longshadow.engine.runtime.requests import Request, make_completions
from longshadow.engine.runtime.sampling_params import SamplingParams, check_unicode
from longshadow.engine.runtime.shapes import Start

Prompt = str | list[int]


@dataclass(frozen=True, eq=False, kw_only=True)
class Intake:
    """Checks prompts and parameters against a model's and an engine's limits.

    Args:
        could_admit: whether the memory would do for a need of so many completions, if no other request ran.
    """

    tokenizer: PreTrainedTokenizerBase | None
    defaults: ModelDefaults
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    accounting: Accounting
    could_admit: Callable[[Need, int], bool]
    device: torch.device

    def need_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises ValueError, saying what for, where there is none."""
        if self.tokenizer is None:
            raise ValueError(f"this engine has no tokenizer for {what}: give token ids, or the LLM a tokenizer")
        return self.tokenizer

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
        tokens = self.tokens(prompt, is_beginning=document is None)
        if params.n > self.max_num_seqs:
            raise ValueError(f"n must be at most max_num_seqs = {self.max_num_seqs}, got {params.n}")
        for token in params.stop_token_ids or ():
            if token >= self.vocab_size:
                raise ValueError(f"stop_token_ids must be below {self.vocab_size}, the model's tokens, got {token}")
        start = None if document is None else document.state.start
        history = 0 if document is None else document.num_tokens
        room = self.max_model_len - history - len(tokens)
        filled = self._fill(params, len(tokens), start, room)
        assert filled.max_tokens is not None
        if filled.stops:
            self.need_tokenizer("stop texts")
        if filled.max_tokens > room:
            before = f"the document's {history:,} tokens, " if document is not None else ""
            raise RequestTooLong(
                f"{before}the prompt's {len(tokens):,} and max_tokens = {filled.max_tokens:,} make "
                f"{history + len(tokens) + filled.max_tokens:,}, but {self.max_model_len:,} fit"
            )
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
        """Parameters with the model's defaults; where they leave the length open, no longer than memory allows."""
        filled = self.defaults.fill(params, room)
        if params.max_tokens is not None or self.could_admit(self._need(filled, num_prompt, start), filled.n):
            return filled
        assert filled.max_tokens is not None
        fits, exceeds = 1, filled.max_tokens
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            if self.could_admit(self._need(self.defaults.fill(params, middle), num_prompt, start), params.n):
                fits = middle
            else:
                exceeds = middle
        return self.defaults.fill(params, fits)


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
