"""The engine: many requests at once over compressed caches, and documents that they share.

The public names are imported when first used: parameters and errors alone need neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longshadow.engine.runtime.documents import Document
    from longshadow.engine.runtime.errors import (
        DocumentError,
        EngineClosed,
        EngineDead,
        QueueFull,
        RequestFailed,
        RequestTooLong,
    )
    from longshadow.engine.runtime.llm import LLM
    from longshadow.engine.runtime.outputs import (
        CompletionOutput,
        EngineStatistics,
        RequestMetrics,
        RequestOutput,
        TokenLogprob,
    )
    from longshadow.engine.runtime.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "Document",
    "DocumentError",
    "EngineClosed",
    "EngineDead",
    "EngineStatistics",
    "QueueFull",
    "RequestFailed",
    "RequestMetrics",
    "RequestOutput",
    "RequestTooLong",
    "SamplingParams",
    "TokenLogprob",
]

_HOME = {
    "LLM": "llm",
    "Document": "documents",
    "SamplingParams": "sampling_params",
    **dict.fromkeys(
        ("DocumentError", "EngineClosed", "EngineDead", "QueueFull", "RequestFailed", "RequestTooLong"), "errors"
    ),
    **dict.fromkeys(
        ("CompletionOutput", "EngineStatistics", "RequestMetrics", "RequestOutput", "TokenLogprob"), "outputs"
    ),
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
