"""What a request gives back, and what an engine tells about itself."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One generated token's log probability under the model, before temperature and penalties.

    Attributes:
        rank: 1 for the most likely token.
        token: its text alone, which may be part of a character.
        top: (token id, its text, its log probability) of the most likely tokens, as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    token: str
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One completion, as far as it is.

    Attributes:
        index: 0 .. n - 1.
        text: whole characters only, without a stop text or what may become one.
        token_ids: every generated token, the one that ended the answer included.
        logprobs: of each token, when asked for.
        finish_reason: None while it runs.
        stop_reason: the stop text or stop token that ended it; None for an end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """When things happened to a request, in seconds of `time.monotonic`; None for what has not happened.

    Attributes:
        queue_seconds: from its arrival to its admission.
    """

    arrival: float
    first_token: float | None
    finished: float | None
    queue_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A request, as far as it is.

    Attributes:
        prompt_token_ids: the request's own prompt, without the document it continues.
        num_cached_tokens: tokens of document and prompt that were not computed for this request.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    metrics: RequestMetrics


@dataclass(frozen=True, kw_only=True)
class EngineStatistics:
    """An engine at one moment; counts are since its start.

    Attributes:
        num_running: sequences that hold a slot, prefilling or decoding.
        num_waiting: requests that were not admitted yet.
        num_failed: requests and documents on which the engine failed while it went on.
        num_prompt_tokens: tokens prefilled, those of documents included.
        num_cached_tokens: prompt tokens that were there already, from a document or the prefix cache.
        tokens_per_second: generated tokens, over the last seconds.
        hit_rate: share of candidate chunks whose keys were resident.
        attended_fraction: attended tokens over cached tokens, per decoding step and KV head.
        prefix_cache_hits: requests that began with a cached prefix, of `prefix_cache_queries` that looked for one.
        device_bytes: reserved for admitted requests, held by documents and cached prefixes; at most the limit.
    """

    num_running: int
    num_waiting: int
    num_documents: int
    num_failed: int
    num_generated_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    tokens_per_second: float
    hit_rate: float
    attended_fraction: float
    prefix_cache_hits: int
    prefix_cache_queries: int
    device_bytes: int
    device_limit_bytes: int
    host_bytes: int
    host_limit_bytes: int
