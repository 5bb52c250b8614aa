"""What callers see while they wait: a bar over requests, the progress of a document."""

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from longshadow.engine.runtime.documents import Document

HEARTBEAT_SECONDS = 0.5


@contextmanager
def request_bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on standard error; yields what moves it on."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)


def wait_for_document(
    arrived: "queue.SimpleQueue[tuple[int, int] | Document | Exception]",
    num_tokens: int,
    on_progress: Callable[[int, int], None] | None,
) -> Document:
    """The document that arrives in the end; meanwhile `on_progress` hears of it, also while nothing happens."""
    progress = (0, num_tokens)
    while True:
        try:
            item = arrived.get(timeout=HEARTBEAT_SECONDS)
        except queue.Empty:
            item = progress
        if isinstance(item, Exception):
            raise item
        if isinstance(item, Document):
            return item
        progress = item
        if on_progress is not None:
            on_progress(*progress)
