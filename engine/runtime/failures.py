"""Failures in the engine's loop: whose they are, and what the log and the requests are told."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from longshadow.engine.runtime.errors import RequestFailed
from longshadow.engine.runtime.requests import Reading, Request

logger = logging.getLogger(__name__)


class Failures:
    """Jobs that failed in the step that is being taken; the engine lets them go at its end."""

    def __init__(self) -> None:
        self._failed: list[tuple[Request | Reading, BaseException]] = []

    @contextmanager
    def of(self, job: Request | Reading) -> Iterator[None]:
        """Within, work for one job alone: what it raises is that job's failure."""
        try:
            yield
        # Panics of libraries in Rust are no Exception; the loop's thread gets no interrupts.
        except BaseException as error:
            self.add(job, error)

    def add(self, job: Request | Reading, error: BaseException) -> None:
        """Counts a job as failed; the first reason is kept."""
        if all(job is not failed for failed, _ in self._failed):
            self._failed.append((job, error))

    def __contains__(self, job: object) -> bool:
        return any(job is failed for failed, _ in self._failed)

    def take(self) -> list[tuple[Request | Reading, BaseException]]:
        """Those that failed since the last time."""
        failed, self._failed = self._failed, []
        return failed


def tell_failed(job: Request | Reading, error: BaseException) -> None:
    """Logs the failure of a job that has left the engine, and tells whoever waits for it without details."""
    name = f"the request {job.id}" if isinstance(job, Request) else "the reading of a document"
    logger.error("%s failed; the engine goes on", name, exc_info=error)
    if isinstance(job, Request):
        for completion in job.completions:
            completion.drop()
    failure = RequestFailed("the engine failed on this request; its log says why")
    failure.__cause__ = error
    with suppress(Exception):  # the listener itself may be what failed
        job.sink(failure)
