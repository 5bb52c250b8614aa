"""How a request's tokens are chosen and when it ends; names and meanings are vLLM's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

GREEDY_TEMPERATURE = 1e-5
MOST_LOGPROBS = 100
LARGEST_SEED = 2**63 - 1
MOST_TOP_K = 2**31 - 1
# Beyond these a logit, divided or multiplied, leaves the range of fp32.
LEAST_PENALTY, MOST_PENALTY = 1e-4, 1e4


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    None means the model's default: what its generation_config says, as in `model.generate`, and where it says nothing,
    that nothing is done. A model samples by default if its `do_sample` is set; otherwise a temperature does it.

    Args:
        n: completions of the prompt, at least 1; they share its segments.
        temperature: 0 (below 1e-5) takes the most likely token, above it samples.
        top_p: sample from the most likely tokens that together have this probability, 0 < top_p <= 1.
        top_k: sample from this many most likely tokens; 0 or -1: from all.
        min_p: leave out tokens less likely than this times the most likely one's probability, 0 <= min_p <= 1.
        repetition_penalty: logits of tokens of prompt and answer are divided by it (negative ones multiplied); above 0.
        presence_penalty: subtracted from logits of tokens that the answer holds, -2 .. 2.
        frequency_penalty: subtracted once for each time the answer holds the token, -2 .. 2.
        stop: texts that end the answer; they are not part of its text.
        stop_token_ids: tokens that end the answer; like an end-of-sequence token they give no text.
        ignore_eos: go on after an end-of-sequence token.
        seed: of the request's own random numbers, 0 .. 2^63 - 1; None: a different one each time.
        logprobs: also return this many most likely tokens for each chosen one, 0 .. 100; None: no log probabilities.
        max_tokens: tokens to generate at most, at least 1; None: as many as fit, or as the model's default says.
        min_tokens: tokens before an end-of-sequence token, a stop token or a stop text may end the answer.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] | str | None = None
    stop_token_ids: tuple[int, ...] | None = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    max_tokens: int | None = 16
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        check_integer("n", self.n, 1)
        if self.temperature is not None:
            _check_number("temperature", self.temperature, 0, math.inf, include_last=False)
        if self.top_p is not None:
            _check_number("top_p", self.top_p, 0, 1, include_first=False)
        if self.top_k is not None:
            check_integer("top_k", self.top_k, -1, MOST_TOP_K)
        if self.min_p is not None:
            _check_number("min_p", self.min_p, 0, 1)
        if self.repetition_penalty is not None:
            _check_number("repetition_penalty", self.repetition_penalty, LEAST_PENALTY, MOST_PENALTY)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_texts("stop", self.stop)
        _check_tokens("stop_token_ids", self.stop_token_ids)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        if self.seed is not None:
            check_integer("seed", self.seed, 0, LARGEST_SEED)
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1)
        if self.min_tokens is not None:
            check_integer("min_tokens", self.min_tokens, 0, self.max_tokens)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts, a single one as a tuple, too."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken; of parameters whose temperature is known."""
        assert self.temperature is not None
        return self.temperature < GREEDY_TEMPERATURE


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raises ValueError, which begins with `name`, for anything but a whole number from `least` to `most`."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most):
        return
    allowed = f"at least {least}" if most is None else f"between {least} and {most}"
    raise ValueError(f"{name} must be a whole number, {allowed}, got {value!r}")


def _check_number(
    name: str, value: object, least: float, most: float, *, include_first: bool = True, include_last: bool = True
) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        above = value >= least if include_first else value > least
        below = value <= most if include_last else value < most
        if above and below:
            return
    first = f"at least {least}" if include_first else f"above {least}"
    last = "finite" if most == math.inf else f"at most {most}"
    raise ValueError(f"{name} must be {first} and {last}, got {value!r}")


def _check_texts(name: str, texts: object) -> None:
    if texts is None:
        return
    for text in [texts] if isinstance(texts, str) else _as_list(name, texts, "texts"):
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} must hold texts of at least one character, got {text!r}")
        check_unicode(name, text)


def _check_tokens(name: str, tokens: object) -> None:
    for token in () if tokens is None else _as_list(name, tokens, "token ids"):
        check_integer(name, token, 0)


def _as_list(name: str, values: object, what: str) -> Sequence[object]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name} must be a list of {what}, got {values!r}")
    return values


def check_unicode(name: str, text: str) -> None:
    """Raises ValueError for half of a surrogate pair, which JSON can escape and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be Unicode text, but character {error.start:,} is half of a surrogate pair"
        ) from error
