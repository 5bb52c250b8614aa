"""The engine: many requests at once over compressed caches, and documents that they share."""

from longshadow.engine.runtime.errors import DocumentError, EngineClosed, QueueFull, RequestTooLong
from longshadow.engine.runtime.outputs import (
    CompletionOutput,
    EngineStatistics,
    RequestMetrics,
    RequestOutput,
    TokenLogprob,
)
from longshadow.engine.runtime.sampling_params import SamplingParams

__all__ = [
    "CompletionOutput",
    "DocumentError",
    "EngineClosed",
    "EngineStatistics",
    "QueueFull",
    "RequestMetrics",
    "RequestOutput",
    "RequestTooLong",
    "SamplingParams",
    "TokenLogprob",
]
