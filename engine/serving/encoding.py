"""Tokenising in threads of its own: long texts wait for one another, short ones and the event loop for nobody."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from longshadow.engine.runtime import EngineClosed
from longshadow.engine.serving.errors import ApiError
from longshadow.engine.serving.memory import give_back_memory

T = TypeVar("T")

# Characters, or token ids, from which on a prompt is long: tokenising so many takes about a tenth of a second.
LONG = 100_000
SHORT_THREADS = 2
MOST_SHORT = 1024
MOST_LONG = 16


class Lane:
    """Threads with a bounded queue."""

    def __init__(self, num_threads: int, most: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=f"longshadow-{name}")
        self._most = most
        self._num_open = 0
        self._lock = threading.Lock()

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, which is not begun if the caller is cancelled before its turn.

        Raises:
            ApiError: as many wait already as may.
        """
        with self._lock:
            if self._num_open >= self._most:
                message = f"{self._num_open} prompts wait to be tokenised, as many as may; try again later"
                raise ApiError(429, message, kind="rate_limit_error", code="queue_full")
            self._num_open += 1
        try:
            future = self._threads.submit(work)
        except RuntimeError as error:  # it was closed
            self._leave()
            raise EngineClosed("the server is stopping") from error
        future.add_done_callback(self._leave)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Drops what waits, and waits for what is being done."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _leave(self, future: "Future[Any] | None" = None) -> None:
        with self._lock:
            self._num_open -= 1


class Encoding:
    """A lane for short prompts and one for long ones."""

    def __init__(self) -> None:
        self._short = Lane(SHORT_THREADS, MOST_SHORT, "short-prompts")
        self._long = Lane(1, MOST_LONG, "long-prompts")

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work`, which tokenises `size` characters.

        Raises:
            ApiError: too many wait already.
        """
        return await (self._short.run(work) if size < LONG else self._long.run(lambda: _then_give_back(work)))

    def close(self) -> None:
        """Ends the threads."""
        self._short.close()
        self._long.close()


def _then_give_back(work: Callable[[], T]) -> T:
    try:
        return work()
    finally:
        give_back_memory()
