"""A cache that is given is used: what a model does with one is watched where callers hand it over.

A model may drop a cache that it was given (LongRoPE starts over with another one), make its own, or ignore it. Nothing
would be compressed then, and nobody would know.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from longshadow.engine.shadowkv.attention import AttendingCache
from longshadow.engine.shadowkv.token_log import TokenLog
from longshadow.engine.switching.attention import outside_graphs
from longshadow.engine.switching.interception import intercept


class WatchedCache(AttendingCache, ABC):
    """A cache whose use is watched.

    Attributes:
        num_arrivals: how often keys came in.
        tokens: ids that calls of the model brought.
        is_ahead: the tokens of the running call were counted before it; its launches may be captured.
    """

    num_arrivals: int
    tokens: TokenLog

    @property
    @abstractmethod
    def is_ahead(self) -> bool:
        """See above."""

    @abstractmethod
    def check_text(self, ids: torch.Tensor) -> None:
        """Raises ValueError where a text's ids [B, tokens] do not begin with what is cached."""


def watch(model: nn.Module) -> Callable[[], None]:
    """Watches calls of `model` that carry a `WatchedCache`, until the result is called."""
    return intercept(
        model,
        _around_forward,
        replaced={"generate": _watched_generate, "prepare_inputs_for_generation": _watched_inputs},
    )


def _around_forward(model: nn.Module, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, WatchedCache):
        return forward(**kwargs)
    return _watched_forward(model, forward, cache, **kwargs)


@outside_graphs
def _watched_forward(model: nn.Module, forward: Callable[..., Any], cache: WatchedCache, /, **kwargs: Any) -> Any:
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False stands beside a ShadowKVCache: leave out one of them")
    output = _using(cache, type(model).__name__, forward, **kwargs)
    ids = kwargs.get("input_ids")
    if ids is not None and not cache.is_ahead:
        cache.tokens.append(ids)
    return output


def _using(cache: WatchedCache, name: str, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    before = cache.num_arrivals
    output = call(*args, **kwargs)
    if cache.num_arrivals == before:
        raise RuntimeError(f"{name} was given a ShadowKVCache and did not use it: it is not supported in this call")
    return output


def _watched_generate(generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def watched(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, WatchedCache):
            return generate(*args, **kwargs)
        return _using(cache, _owner(generate), generate, *args, **kwargs)

    return watched


def _watched_inputs(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Compares a text with what is cached, and gives the cache back to a model that starts over without it."""

    @functools.wraps(prepare)
    def watched(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, WatchedCache):
            return prepare(*args, **kwargs)
        text = args[0] if args else kwargs.get("input_ids")
        # With a length to cut it to, the text is the whole one.
        is_whole = kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None
        if is_whole and text is not None and kwargs.get("inputs_embeds") is None:
            cache.check_text(text)
        inputs = prepare(*args, **kwargs)
        if inputs.get("past_key_values") is not cache:
            _take_back(inputs, cache, _owner(prepare))
        return inputs

    return watched


def _take_back(inputs: dict[str, Any], cache: WatchedCache, name: str) -> None:
    """LongRoPE turns all keys by other angles beyond a length: the model reads the whole text again without a cache."""
    ids = inputs.get("input_ids")
    if ids is None or ids.shape[1] <= cache.get_seq_length():
        raise RuntimeError(f"{name} dropped the ShadowKVCache it was given, in the middle of a text")
    cache.reset()  # type: ignore[no-untyped-call]
    inputs["past_key_values"] = cache


def _owner(method: Any) -> str:
    return type(getattr(method, "__self__", None)).__name__
