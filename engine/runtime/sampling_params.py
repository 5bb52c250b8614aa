"""How a request's tokens are chosen and when it ends; names and meanings are vLLM's."""

import math
from dataclasses import dataclass

GREEDY_TEMPERATURE = 1e-5
MOST_LOGPROBS = 100
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

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
        max_tokens: tokens to generate at most, at least 1.
        min_tokens: tokens before an end-of-sequence token, a stop token or a stop text may end the answer.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] | str | None = ()
    stop_token_ids: tuple[int, ...] | None = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0

    def __post_init__(self) -> None:
        _check_integer("n", self.n, 1)
        _check_number("temperature", self.temperature, 0, math.inf, include_last=False)
        _check_number("top_p", self.top_p, 0, 1, include_first=False)
        _check_integer("top_k", self.top_k, -1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number(
            "repetition_penalty", self.repetition_penalty, 0, math.inf, include_first=False, include_last=False
        )
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_texts("stop", self.stops)
        for token in self.stop_token_ids or ():
            _check_integer("stop_token_ids", token, 0)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, LARGEST_SEED)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        _check_integer("max_tokens", self.max_tokens, 1)
        _check_integer("min_tokens", self.min_tokens, 0, self.max_tokens)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts, a single one as a tuple, too."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_TEMPERATURE


def _check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
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


def _check_texts(name: str, texts: tuple[str, ...]) -> None:
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} must hold texts of at least one character, got {text!r}")
