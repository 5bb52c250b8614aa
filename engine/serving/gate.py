"""What every request passes first: whose name it calls, its key, its size; and the headers that every answer gets."""

import asyncio
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longshadow.engine.serving.connection import CLIENT_CLOSED_REQUEST, ClientGone
from longshadow.engine.serving.errors import ApiError, stopping
from longshadow.engine.serving.service import Service
from longshadow.engine.serving.settings import LOOPBACK_NAMES
from longshadow.engine.serving.structure import check_structure

OPEN_PATHS = ("/", "/health", "/openapi.json")
BODY_SECONDS = 120.0
DISCARD_SECONDS = 30.0
DISCARD_IDLE_SECONDS = 1.0
HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Gate:
    """Middleware around the application.

    The body is taken in here and handed on, so that its size is checked as it comes, whatever its header says.
    """

    def __init__(self, application: ASGIApp, service: Service) -> None:
        self._application = application
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        status = CLIENT_CLOSED_REQUEST

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._pass(scope, receive, send_with_headers)
        except ClientGone:
            pass
        finally:
            # The route's pattern: a path would be a new label each time.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE") else "other"
            self._service.metrics.count_response(method, route, status)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._service.settings.max_body_bytes
        try:
            self._check_head(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await discard_body(receive, limit)
            await _refuse(error, scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await read_body(receive, limit, pause=self._service.settings.patience_seconds)
            check_structure(body)
        except TimeoutError:
            slow = ApiError(408, f"the request's body took longer than {BODY_SECONDS:g} seconds", code="slow_body")
            await _refuse(slow, scope, receive, send)
        except ApiError as error:
            await _refuse(error, scope, receive, send)
        else:
            await self._application(scope, _replay(body, receive), send)

    def _check_head(self, path: str, headers: Headers) -> None:
        self._check_host(headers.get("host", ""))
        if path not in OPEN_PATHS:
            self._check_key(headers.get("authorization", ""))
        if self._service.is_stopping:
            raise stopping()

    def _check_host(self, host: str) -> None:
        # A page elsewhere can have its own name resolve to this machine, and its visitors' browsers would let it read
        # what a server without a key answers.
        settings = self._service.settings
        if not settings.is_local or settings.api_key is not None:
            return
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in (*LOOPBACK_NAMES, settings.host):
            message = "this server answers to names of this machine only; to serve others give --host and an API key"
            raise ApiError(403, message, code="wrong_host")

    def _check_key(self, authorization: str) -> None:
        expected = self._service.settings.api_key
        if expected is None:
            return
        scheme, _, given = authorization.partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), expected.encode())
        if scheme.lower() != "bearer" or not is_right:
            message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, kind="authentication_error", code="invalid_api_key")


async def read_body(receive: Receive, limit: int, *, pause: float) -> bytes:
    """The whole body of a request.

    Raises:
        ApiError: it is larger than `limit` bytes, or nothing came for `pause` seconds.
        ClientGone: the client left while it sent it.
    """
    body = bytearray()
    while True:
        try:
            async with asyncio.timeout(pause):
                message = await receive()
        except TimeoutError as error:
            raise ApiError(408, f"the request's body stopped for {pause:g} seconds", code="slow_body") from error
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        has_more = message.get("more_body", False)
        if len(body) > limit:
            body.clear()
            if has_more:
                await discard_body(receive, limit)
            raise ApiError(413, f"the request's body is larger than {limit:,} bytes", code="body_too_large")
        if not has_more:
            return bytes(body)


async def discard_body(receive: Receive, limit: int) -> None:
    """Reads on for a while: most clients look for an answer only when they have sent all they have."""
    num_bytes = 0
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while num_bytes <= limit:
                async with asyncio.timeout(DISCARD_IDLE_SECONDS):
                    message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        pass


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    response = error.response()
    response.headers["Connection"] = "close"
    await response(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body has been read: gives it once more, then what comes after it."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
