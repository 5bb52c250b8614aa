"""Log probabilities in the two shapes that OpenAI's interface has."""

from typing import Any

from longshadow.engine.runtime import CompletionOutput, TokenLogprob

# JSON has no infinity.
LEAST_LOGPROB = -9999.0
UNDECODABLE = "\ufffd"


def chat_logprobs(completion: CompletionOutput, start: int) -> dict[str, Any] | None:
    """Of the tokens from number `start` on, as chats have them; None when they were not asked for."""
    if completion.logprobs is None:
        return None
    content = [
        _entry(token.token, token.logprob) | {"top_logprobs": [_entry(text, logprob) for _, text, logprob in token.top]}
        for token in completion.logprobs[start:]
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(completion: CompletionOutput, start: int) -> dict[str, Any] | None:
    """The same as completions have them; `text_offset` counts the characters of the tokens before."""
    if completion.logprobs is None:
        return None
    offset = sum(len(token.token) for token in completion.logprobs[:start])
    offsets = []
    for token in completion.logprobs[start:]:
        offsets.append(offset)
        offset += len(token.token)
    tokens = completion.logprobs[start:]
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [_by_text(token) for token in tokens],
        "text_offset": offsets,
    }


def _by_text(token: TokenLogprob) -> dict[str, float]:
    # The chosen token is always there, though it need not be among the most likely.
    return {text: _finite(logprob) for _, text, logprob in token.top} | {token.token: _finite(token.logprob)}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    encoded = None if UNDECODABLE in text else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": encoded}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
