"""Errors as OpenAI's interface has them: a status code and {"error": {message, type, param, code}}."""

import json
import logging
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from longshadow.engine.runtime.errors import EngineClosed, EngineDead, QueueFull, RequestFailed, RequestTooLong

RETRY_SECONDS = 1
TOO_LONG = "context_length_exceeded"

logger = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every refusal."""

    error: ErrorDetail


class ApiError(Exception):
    """A refusal.

    Args:
        kind: OpenAI's `type`.
        param: the parameter at fault, if it is one.
        code: what programs can tell it by.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What belongs to the status: when to try again, how to sign in."""
        if self.status in (429, 503, 507):
            return {"Retry-After": str(RETRY_SECONDS)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def response(self) -> Response:
        """As an HTTP response."""
        # ASCII: a message may quote half of a surrogate pair, which UTF-8 cannot hold.
        content = json.dumps(self.body()).encode("ascii")
        return Response(content, self.status, headers=self.headers(), media_type="application/json")


def too_slow(seconds: float) -> ApiError:
    """For a request that took longer than it may."""
    message = f"the request took longer than the {seconds:g} seconds that this server allows; try again later"
    return ApiError(503, message, kind="service_unavailable_error", code="timeout")


def stopping() -> ApiError:
    """For a request that the server's end cuts off, or that comes too late."""
    return ApiError(503, "the server is stopping", kind="service_unavailable_error", code="shutting_down")


def internal_error() -> ApiError:
    """For what nobody expected; its cause stands in the log."""
    return ApiError(500, "the server failed; its log says why", kind="server_error", code="internal_error")


def as_api_error(error: Exception) -> ApiError:
    """What an error from the engine means to a client; one that nobody expected is logged."""
    match error:
        case ApiError():
            return error
        case RequestTooLong():
            # langchain looks for the code in the error's text, where openai 3 no longer puts it.
            return ApiError(400, f"{error} [{TOO_LONG}]", code=TOO_LONG)
        case ValueError():
            return ApiError(400, str(error), param=_parameter_of(str(error)))
        case QueueFull():
            return ApiError(429, str(error), kind="rate_limit_error", code="queue_full")
        case RequestFailed() | EngineDead():  # which the engine has logged
            return internal_error()
        case EngineClosed():
            return ApiError(503, str(error), kind="service_unavailable_error", code="engine_closed")
    logger.error("a request failed", exc_info=error)
    return internal_error()


def _parameter_of(message: str) -> str | None:
    # The engine's messages begin with the parameter at fault: `top_p must be above 0 ...`.
    first, _, rest = message.partition(" ")
    return first if rest.startswith(("must ", "cannot ")) and first.isidentifier() else None
