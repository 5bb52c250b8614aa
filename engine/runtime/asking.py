"""The caller's side of requests: many at once until all are answered, or one whose output is followed."""

import asyncio
import queue
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress

from longshadow.engine.runtime.engine import Engine
from longshadow.engine.runtime.errors import QueueFull
from longshadow.engine.runtime.outputs import RequestOutput
from longshadow.engine.runtime.requests import Request, Sink
from longshadow.engine.runtime.waiting import request_bar


def answer_all(engine: Engine, make: Sequence[Callable[[Sink], Request]], progress: bool) -> list[RequestOutput]:
    """Outputs of requests, each made with its sink, in their order; those that the queue does not take wait here.

    If one fails, or the caller is interrupted, all are cancelled. Raises RequestTooLong before any of them runs.
    """
    arrived: queue.SimpleQueue[tuple[int, RequestOutput | Exception]] = queue.SimpleQueue()

    def sink_of(index: int) -> Sink:
        return lambda item: arrived.put((index, item))

    requests = [of_sink(sink_of(index)) for index, of_sink in enumerate(make)]
    outputs: dict[int, RequestOutput] = {}
    engine.check_sizes(requests)
    waiting = list(requests)
    try:
        with request_bar(len(requests), progress) as advance:
            while len(outputs) < len(requests):
                _submit_all(engine, waiting, can_wait=len(outputs) + len(waiting) < len(requests))
                index, item = arrived.get()
                if isinstance(item, Exception):
                    raise item
                outputs[index] = item
                advance()
    except BaseException:
        for request in requests:
            engine.abandon(request)
        raise
    return [outputs[index] for index in range(len(requests))]


def _submit_all(engine: Engine, waiting: list[Request], *, can_wait: bool) -> None:
    """Submits what the queue takes; raises QueueFull when none of ours is in it whose end could be waited for."""
    while waiting:
        try:
            engine.submit(waiting[0])
        except QueueFull:
            if not can_wait:
                raise
            return
        waiting.pop(0)
        can_wait = True


async def follow(
    engine: Engine, request: Request, owner: object, on_queued: Callable[[], None] | None = None
) -> AsyncGenerator[RequestOutput, None]:
    """Outputs as they grow; leaving early cancels the request. Holds `owner`, with which the engine would be closed."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()

    def deliver(item: RequestOutput | Exception) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody listens
            loop.call_soon_threadsafe(arrived.put_nowait, item)

    request.sink, request.streams = deliver, True
    engine.submit(request)
    try:
        if on_queued is not None:
            on_queued()
        while True:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finished:
                return
    finally:
        engine.abandon(request)
