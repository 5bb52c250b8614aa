"""Work as a CUDA graph, and its time on the device alone: what the host takes to launch is left out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.timing import NO_PREPARATION, Candidate, Timing, time_interleaved

# A spin on the device, some 0.1 ms, during which the host enqueues what is timed.
SPIN_CYCLES = 200_000


def captured(run: Callable[[], object], device: str, *, warmup: int = 2) -> Callable[[], object]:
    """Replays the launches of `run` as one CUDA graph, after some ordinary runs; on a CPU it is `run` itself."""
    if not device.startswith("cuda"):
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_on_device(
    replay: Callable[[], object],
    device: str,
    *,
    repeats: int,
    calls: int = 1,
    prepare: Callable[[], object] | None = None,
) -> Timing:
    """Seconds of one of the `calls` that `replay` makes, `repeats` times, after one untimed round.

    The device is kept busy until everything is enqueued, so that only its own time counts. `prepare` is not timed.
    """
    prepare = prepare or NO_PREPARATION
    if not device.startswith("cuda"):
        timing = time_interleaved({"": Candidate(run=replay, prepare=prepare)}, repeats=repeats)[""]
        return Timing(seconds=tuple(taken / calls for taken in timing.seconds))
    taken: list[float] = []
    for _ in range(1 + repeats):
        prepare()
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN_CYCLES)
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3 / calls)
    return Timing(seconds=tuple(taken[1:]))
