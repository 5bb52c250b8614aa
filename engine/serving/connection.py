"""Work for a client that may go away, and answers that come in pieces."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
Event = dict[str, Any] | str

COMMENT = b": waiting\n\n"
CLIENT_CLOSED_REQUEST = 499  # nginx's status for nobody left to answer


class ClientGone(Exception):
    """The client closed the connection before it was answered."""


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Args:
        receive: the request's, after its body has been read.

    Raises:
        ClientGone: the connection was closed first.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await cancelled(task, gone)


async def cancelled(*tasks: "asyncio.Future[Any]") -> None:
    """Cancels tasks and waits until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: a dictionary as JSON, a text as it is. They are closed when the client goes away.

    Comments, which clients skip, come at once and whenever there has been no event for a while. What fails must be told
    by an event: the status has been sent by then.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Event, None], *, comment_seconds: float) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["Cache-Control"] = "no-store"
        self.headers["X-Accel-Buffering"] = "no"  # nginx would hold events back
        self._events = events
        self._comment_seconds = comment_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send_part(send, COMMENT)
            while (event := await self._next(events, send)) is not None:
                await _send_part(send, _encoded(event))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self, events: AsyncGenerator[Event, None], send: Send) -> Event | None:
        coming = asyncio.ensure_future(_following(events))
        try:
            while not (await asyncio.wait((coming,), timeout=self._comment_seconds))[0]:
                await _send_part(send, COMMENT)
            return coming.result()
        finally:
            if not coming.done():
                await cancelled(coming)


async def _following(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _encoded(event: Event) -> bytes:
    data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"data: {data}\n\n".encode("utf-8", errors="replace")
