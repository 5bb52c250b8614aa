"""Another attention for some calls of an attention module, chosen call by call.

Attention modules look their function up by the name in their configuration. A module that is offered another one looks
at its configuration through a `SwitchedConfig`, which gives another name during the calls that are lent one, in the
thread that makes them. So nothing is renamed, and every other call is the model's own.
"""

import copy
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from longshadow.engine.switching.interception import Around, intercept

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(function: Function) -> Function:
    """The function, which torch.compile neither traces nor compiles a part of."""
    disabled: Function = torch.compiler.disable(function)
    return disabled


class _Lent(threading.local):
    """The attention that this thread's call was lent."""

    implementation: str | None = None


_lent = _Lent()


class SwitchedConfig:
    """An attention module's view of its configuration; copies and pickles of it are the plain configuration."""

    def __init__(self, config: Any) -> None:
        vars(self)["_config"] = config

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._config)

    @property
    def _attn_implementation(self) -> Any:
        # What is lent never runs in a graph, so a graph that is traced has the model's own attention.
        if not torch.compiler.is_compiling() and _lent.implementation is not None:
            return _lent.implementation
        return self._config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._config, memo)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _itself, (self._config,)


def _itself(config: Any) -> Any:
    return config


def offer_attention(modules: Iterable[nn.Module], around: Around) -> Callable[[], None]:
    """Lets `around` lend calls of attention modules another attention, until the returned function is called."""
    undo = [intercept(module, around, replaced={"config": SwitchedConfig}) for module in modules]

    def withdraw() -> None:
        for each in undo:
            each()

    return withdraw


@outside_graphs
def lend_attention(implementation: str, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
    """`forward(**kwargs)` with the attention function of that name, outside of compiled graphs."""
    before = _lent.implementation
    _lent.implementation = implementation
    try:
        return forward(**kwargs)
    finally:
        _lent.implementation = before
