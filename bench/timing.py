"""Timing of several candidates side by side: A B C A B C, so that a drifting machine hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

NO_PREPARATION: Callable[[], object] = lambda: None  # noqa: E731


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to time: `run` is timed, `prepare` is called before it, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = NO_PREPARATION


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one candidate's rounds, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return median(self.seconds)

    @property
    def p20(self) -> float:
        """A fifth of the rounds was faster."""
        return self._percentile(20)

    @property
    def p80(self) -> float:
        """A fifth of the rounds was slower."""
        return self._percentile(80)

    def _percentile(self, percent: int) -> float:
        if len(self.seconds) == 1:
            return self.seconds[0]
        return quantiles(self.seconds, n=100, method="inclusive")[percent - 1]

    def row(self) -> dict[str, float]:
        """The columns `median`, `p20` and `p80`, in seconds."""
        return {"median": self.median, "p20": self.p20, "p80": self.p80}


def time_interleaved(
    candidates: Mapping[str, Candidate], *, repeats: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, Timing]:
    """Times every candidate once per round, for `repeats` rounds after `warmup` untimed ones.

    On CUDA the time is that between two events on the current stream, with the device idle before the first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    timed = _time_on_cuda if device.startswith("cuda") else _time_on_cpu
    for round_number in range(warmup + repeats):
        for name, candidate in candidates.items():
            candidate.prepare()
            taken = timed(candidate.run)
            if round_number >= warmup:
                seconds[name].append(taken)
    return {name: Timing(seconds=tuple(taken)) for name, taken in seconds.items()}


def paired_speedup(baseline: Timing, candidate: Timing) -> float:
    """How many times faster `candidate` is: the median over rounds of the ratio within a round."""
    return median(slow / fast for slow, fast in zip(baseline.seconds, candidate.seconds, strict=True))


def _time_on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _time_on_cuda(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


class Stopwatch:
    """Seconds between successive laps, the first from the making of the stopwatch; the device idle at each."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device.startswith("cuda")
        self.laps: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        """Ends the part `name`."""
        now = self._now()
        self.laps[name] = now - self._last
        self._last = now

    def _now(self) -> float:
        if self._on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def tensor_bytes(*tensors: torch.Tensor) -> int:
    """Bytes that reading every element of the tensors once moves."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def rates(timing: Timing, *, num_bytes: int | None = None, flops: int | None = None) -> dict[str, Any]:
    """The columns that stand beside a time: bytes and bytes per second, floating-point operations per second."""
    row: dict[str, Any] = {}
    if num_bytes is not None:
        row |= {"bytes": num_bytes, "bytes_per_s": num_bytes / timing.median}
    if flops is not None:
        row |= {"flops": flops, "flops_per_s": flops / timing.median}
    return row
