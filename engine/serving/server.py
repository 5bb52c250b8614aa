"""The running server: its socket, its signals, and an end that leaves no request without an answer."""

import asyncio
import errno
import logging
import signal
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import uvicorn

from longshadow.engine.runtime import EngineDead
from longshadow.engine.serving import open_files
from longshadow.engine.serving.application import make_application
from longshadow.engine.serving.connection import cancelled
from longshadow.engine.serving.protocol import Connections, limited_protocol
from longshadow.engine.serving.service import Service
from longshadow.engine.serving.settings import ServingSettings
from longshadow.engine.serving.sparing import Sparing

# Connections that the system keeps until they are accepted, and that are accepted before others are closed for them.
BACKLOG = 2048
ACCEPTED_AT_ONCE = 8
NO_FILES = (errno.EMFILE, errno.ENFILE)
KEEP_ALIVE_SECONDS = 75
# To send the last events once every request has been failed.
FLUSH_SECONDS = 10.0

logger = logging.getLogger(__name__)


def bound_socket(settings: ServingSettings) -> socket.socket:
    """A socket with the server's address, which does not listen yet.

    Raises:
        OSError: in one line, why the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a bound socket, as browsers take it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(service: Service, bound: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, then finishes or fails every request and closes the engine.

    Raises:
        EngineDead: the engine failed, which ends the server, too.
    """
    open_files.raise_limit()
    try:
        make_server(service).run([bound])
    finally:
        service.llm.close()
        service.close()
    if service.llm.has_failed:
        raise EngineDead("the engine failed, so the server has ended; the log above says why")


def make_server(service: Service) -> "GracefulServer":
    """A server that does not run yet."""
    settings = service.settings
    most = open_files.room_for_connections(settings.max_connections)
    connections = Connections(most, patience_seconds=settings.patience_seconds)
    config = uvicorn.Config(
        make_application(service),
        loop="asyncio",
        http=limited_protocol(connections),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.grace_seconds + FLUSH_SECONDS),
    )
    return GracefulServer(config, service, connections)


class GracefulServer(uvicorn.Server):
    """uvicorn's server with an announcement, and an end in two steps: finish, then fail what is left."""

    def __init__(self, config: uvicorn.Config, service: Service, connections: Connections) -> None:
        super().__init__(config)
        self._service = service
        self._connections = connections
        self._notices = Sparing(logger)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, then says where."""
        asyncio.get_running_loop().set_exception_handler(self._note_failure)
        await super().startup(sockets)
        for bound in sockets or ():
            bound.listen(BACKLOG)
        if self.started and sockets:
            name = self._service.settings.model_name
            print(f"serving {name} at {url_of(sockets[0])} (Ctrl-C stops)", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: when asked to, or when the engine has failed and no request could be answered any more."""
        return await super().on_tick(counter) or self._service.llm.has_failed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests, waits for the open ones, and after the grace time closes the engine below them."""
        self._service.is_stopping = True
        failing = asyncio.ensure_future(self._fail_after_grace())
        try:
            await super().shutdown(sockets)
        finally:
            await cancelled(failing)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Ctrl-C and SIGTERM stop the server; unlike uvicorn's, this does not raise them again once it has stopped."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Takes the event loop's failures; without a file to accept a connection with there are many in a row."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in NO_FILES:
            loop.default_exception_handler(context)
            return
        self._connections.close_longest_waiting()
        self._notices.warning(
            f"all {open_files.limit() or 0:,} files that this process may open are open, so clients cannot connect; "
            "`ulimit -n` raises the limit"
        )

    async def _fail_after_grace(self) -> None:
        await asyncio.sleep(self._service.settings.grace_seconds)
        # Each open request now raises EngineClosed, which its client is told.
        await asyncio.to_thread(self._service.llm.close)
