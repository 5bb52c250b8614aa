"""Figures for Prometheus: the engine's at the moment of asking, and what requests brought and took."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from longshadow.engine.runtime import RequestOutput

if TYPE_CHECKING:
    from longshadow.engine.runtime import LLM

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)

# name: attribute of EngineStatistics, what it says
GAUGES = {
    "sequences_running": ("num_running", "Sequences that hold a slot, prefilling or decoding: the batch."),
    "requests_waiting": ("num_waiting", "Requests that were not admitted yet: the queue."),
    "documents": ("num_documents", "Documents that requests can name."),
    "failed_requests": ("num_failed", "Requests and documents on which the engine failed while it went on."),
    "tokens_per_second": ("tokens_per_second", "Generated tokens per second, over the last seconds."),
    "resident_hit_rate": ("hit_rate", "Share of candidate chunks whose keys were resident."),
    "attended_fraction": ("attended_fraction", "Attended tokens over cached tokens."),
    "prefix_cache_hits": ("prefix_cache_hits", "Requests that began with a cached prefix."),
    "prefix_cache_queries": ("prefix_cache_queries", "Requests that looked for a cached prefix."),
    "device_bytes": ("device_bytes", "Bytes of caches on the device, reserved ones included."),
    "device_limit_bytes": ("device_limit_bytes", "Most bytes that caches may take on the device."),
    "host_bytes": ("host_bytes", "Bytes of caches in host memory, reserved ones included."),
    "host_limit_bytes": ("host_limit_bytes", "Most bytes that caches may take in host memory."),
}


class Metrics:
    """The figures of one server."""

    def __init__(self, llm: "LLM") -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineGauges(llm))
        self._requests = Counter(
            "longshadow_http_requests",
            "Answered HTTP requests; status 499: the client went away.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, without documents.")
        self._cached_tokens = self._counter("cached_tokens", "Tokens of prompts and documents that were there already.")
        self._generated_tokens = self._counter("generated_tokens", "Generated tokens.")
        self._cancelled = self._counter("cancelled_requests", "Requests that ended before they were finished.")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._queue = self._histogram("queue_seconds", "From a request's arrival to its admission.")
        self._duration = self._histogram("request_seconds", "From a request's arrival to its end.")

    def count_response(self, method: str, route: str, status: int) -> None:
        """Counts one answered HTTP request; `route` is the pattern, so that there are few."""
        self._requests.labels(method, route, str(status)).inc()

    def count(self, output: RequestOutput | None) -> None:
        """Counts one request by its last output; None when it ended without any."""
        if output is None or not output.finished:
            self._cancelled.inc()
        if output is None:
            return
        self._prompt_tokens.inc(len(output.prompt_token_ids))
        self._cached_tokens.inc(output.num_cached_tokens)
        self._generated_tokens.inc(sum(len(completion.token_ids) for completion in output.outputs))
        times = output.metrics
        if times.queue_seconds is not None:
            self._queue.observe(times.queue_seconds)
        if times.first_token is not None:
            self._first_token.observe(times.first_token - times.arrival)
        if times.finished is not None:
            self._duration.observe(times.finished - times.arrival)

    def page(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"longshadow_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"longshadow_{name}", text, buckets=SECONDS, registry=self._registry)


class EngineGauges(Collector):
    """Reads the engine's statistics when Prometheus asks."""

    def __init__(self, llm: "LLM") -> None:
        self._llm = llm

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family for each figure."""
        is_up = 0.0 if self._llm.is_closed else 1.0
        yield GaugeMetricFamily("longshadow_engine_up", "1 while the engine takes requests, else 0.", value=is_up)
        statistics = self._llm.statistics()
        for name, (attribute, text) in GAUGES.items():
            yield GaugeMetricFamily(f"longshadow_{name}", text, value=float(getattr(statistics, attribute)))
