"""One shape for all errors of the application: refusals, bodies that are not valid, unknown paths, failures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from longshadow.engine.serving.bodies import Body
from longshadow.engine.serving.connection import CLIENT_CLOSED_REQUEST, ClientGone
from longshadow.engine.serving.errors import ApiError, internal_error


def install_error_handlers(application: FastAPI) -> None:
    """Gives every error of the application the same shape."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return validation_error(error.errors()).response()

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    async def failed(request: Request, error: Exception) -> Response:
        return internal_error().response()

    async def nobody(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    application.add_exception_handler(ApiError, refused)
    application.add_exception_handler(ClientGone, nobody)
    application.add_exception_handler(RequestValidationError, invalid)
    application.add_exception_handler(HTTPException, not_found)
    application.add_exception_handler(Exception, failed)


def validation_error(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first problem that a request's body has, with its place as `param`."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the request's body is not valid JSON", code="invalid_json")
    param = _place(first)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {param}", param=param, code="unknown_parameter")
    if first["type"] == "unsupported":
        return ApiError(400, f"{param} is {first['msg']}", param=param, code="unsupported_parameter")
    # A value that may be of several kinds has a problem with each of them.
    reasons = dict.fromkeys(
        problem["msg"].removeprefix("Value error, ")
        for problem in problems
        if (_place(problem) or "").startswith(param or "")
    )
    message = " or ".join(reasons)
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")


def _place(problem: Mapping[str, Any]) -> str | None:
    # Kinds of a value stand among the names: `prompt.list[constrained-int].0`. A name that is not known stands last.
    *place, last = problem["loc"][1:] or ("",)
    names = [str(part) for part in place if isinstance(part, int) or part in _NAMES]
    is_name = isinstance(last, int) or last in _NAMES or problem["type"] == "extra_forbidden"
    return ".".join([*names, str(last)] if is_name else names) or None


def _names(kind: type[Body]) -> Iterator[str]:
    for body in kind.__subclasses__():
        yield from body.model_fields
        yield from _names(body)


_NAMES = frozenset(_names(Body))
