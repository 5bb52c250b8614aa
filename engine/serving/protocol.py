"""uvicorn's HTTP protocol with limits: how many connections there are, and how long one may keep the server waiting.

A connection that has not sent a whole request yet (headers or body half sent, or idle between two requests) costs its
client nothing, but the server a file. So those get a time, and when there are as many connections as there may be, the
one that has waited longest makes room for the next.
"""

import asyncio
import json
import logging
from http import HTTPStatus
from typing import ClassVar

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from longshadow.engine.serving.errors import ApiError
from longshadow.engine.serving.sparing import Sparing

# Beyond the limit, for telling clients that the server is full.
SPARE_CONNECTIONS = 16

logger = logging.getLogger(__name__)


class Connections:
    """The open connections of one server.

    Args:
        most: connections that may be open.
        patience_seconds: what a client gets to send a request's headers, and to take what was sent to it.
    """

    def __init__(self, most: int, *, patience_seconds: float) -> None:
        self.most = most
        self.patience_seconds = patience_seconds
        self._open: set[LimitedProtocol] = set()
        self._waiting: dict[LimitedProtocol, None] = {}  # longest first
        self._notices = Sparing(logger)

    def add(self, connection: "LimitedProtocol") -> bool:
        """Counts a connection, at the cost of another if there are too many; False when none can be closed."""
        self._open.add(connection)
        while len(self._open) > self.most and self.close_longest_waiting():
            self._notices.warning(
                f"{self.most:,} clients are connected, as many as may be; those without a whole request make room"
            )
        is_wanted = len(self._open) <= self.most
        self._waiting[connection] = None
        return is_wanted

    def remove(self, connection: "LimitedProtocol") -> None:
        """Forgets one that is closed or about to be."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)

    def set_waiting(self, connection: "LimitedProtocol", is_waiting: bool) -> None:
        """Notes whether a connection has a whole request; one that goes on waiting keeps its turn."""
        if not is_waiting:
            self._waiting.pop(connection, None)
        elif connection in self._open:
            self._waiting.setdefault(connection)

    def close_longest_waiting(self) -> bool:
        """Closes the connection that has waited longest for its request; False when none waits."""
        if not self._waiting:
            return False
        longest = next(iter(self._waiting))
        self.remove(longest)
        longest.transport.abort()
        return True

    @property
    def is_beyond_sparing(self) -> bool:
        """True if there are too many to tell another that there are too many."""
        return len(self._open) > self.most + SPARE_CONNECTIONS


class LimitedProtocol(H11Protocol):
    """One connection. `limited_protocol` makes the class of a server."""

    shared: ClassVar[Connections]
    _patience: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self.shared.add(self):
            if self.shared.is_beyond_sparing:
                transport.abort()
                return
            self.app = _full
        self._update(expects_headers=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self.shared.remove(self)
        self._patience = _cancelled(self._patience)
        self._unread = _cancelled(self._unread)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update(expects_headers=True)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Between two requests uvicorn's time for idle connections runs, unless a part of the next one is there.
        self._update(expects_headers=bool(self.conn.trailing_data[0]))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self._unread or self.loop.call_later(self.shared.patience_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = _cancelled(self._unread)

    def send_400_response(self, msg: str) -> None:
        """In the same shape as every other refusal."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _update(self, *, expects_headers: bool) -> None:
        """Notes what the connection waits for; `expects_headers`: they must come within the time that they have."""
        if self.transport.is_closing():
            return
        has_headers = self.conn.their_state is not h11.IDLE
        is_whole = has_headers and (self.cycle is None or not self.cycle.more_body or self.cycle.response_complete)
        self.shared.set_waiting(self, not is_whole)
        if has_headers:
            self._patience = _cancelled(self._patience)
        elif expects_headers and self._patience is None:
            self._patience = self.loop.call_later(self.shared.patience_seconds, self._give_up)

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            seconds = self.shared.patience_seconds
            self._refuse(
                ApiError(408, f"the request's headers took longer than {seconds:g} seconds", code="slow_headers")
            )

    def _refuse(self, error: ApiError) -> None:
        content = json.dumps(error.body()).encode("ascii")
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(content))), ("Connection", "close")]
        reason = HTTPStatus(error.status).phrase
        response = h11.Response(status_code=error.status, headers=headers, reason=reason)
        for event in (response, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


def limited_protocol(connections: Connections) -> type[LimitedProtocol]:
    """The protocol of a server with these connections."""

    class Limited(LimitedProtocol):
        shared = connections

    return Limited


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    message = "as many clients are connected as may be; try again later"
    error = ApiError(503, message, kind="service_unavailable_error", code="too_many_connections")
    response = error.response()
    response.headers["Connection"] = "close"
    await response(scope, receive, send)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
