"""/v1/chat/completions and /v1/completions."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from longshadow.engine.serving.answers import Answer, ChatAnswer, CompletionAnswer
from longshadow.engine.serving.bodies import ChatCompletionBody, CompletionBody, Generation
from longshadow.engine.serving.connection import EventStream, while_connected
from longshadow.engine.serving.errors import as_api_error, too_slow
from longshadow.engine.serving.generation import Prompt, last_outputs, newest_outputs
from longshadow.engine.serving.replies import ChatCompletion, Completion, refusals
from longshadow.engine.serving.service import Service

if TYPE_CHECKING:
    from longshadow.engine.runtime import Document

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for /v1/completions
EVENTS: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": EVENTS, "description": "One object, or with `stream` server-sent events that end in [DONE]."},
    **refusals(400, 401, 404, 413, 429, 500, 503),
}


def completion_routes(service: Service) -> APIRouter:
    """The routes that generate."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=RESPONSES)
    async def chat_completions(body: ChatCompletionBody, request: Request) -> Any:
        service.check_model(body.model)
        document, deadline = await _document_and_deadline(service, body, request)
        try:
            turns = [message.as_turn() for message in body.messages]
            prompt = await asyncio.to_thread(service.llm.chat_prompt, turns, document=document)
        except Exception as error:
            raise as_api_error(error) from error
        max_tokens = body.chosen_max_tokens() or _room(service, len(prompt), document)
        return await _answer(service, request, body, [prompt], document, max_tokens, deadline, ChatAnswer)

    @router.post("/v1/completions", response_model=Completion, responses=RESPONSES)
    async def completions(body: CompletionBody, request: Request) -> Any:
        service.check_model(body.model)
        document, deadline = await _document_and_deadline(service, body, request)
        max_tokens = body.max_tokens or DEFAULT_MAX_TOKENS
        return await _answer(service, request, body, body.prompts(), document, max_tokens, deadline, CompletionAnswer)

    return router


async def _document_and_deadline(
    service: Service, body: Generation, request: Request
) -> "tuple[Document | None, float]":
    """The document that a request names, once it has been read; and the moment when its time is over."""
    deadline = asyncio.get_running_loop().time() + service.settings.request_seconds
    if body.document is None:
        return None, deadline
    try:
        async with asyncio.timeout_at(deadline):
            document = await while_connected(request.receive, service.documents.when_ready(body.document))
    except TimeoutError as error:
        raise too_slow(service.settings.request_seconds) from error
    return document, deadline


def _room(service: Service, num_prompt_tokens: int, document: "Document | None") -> int:
    """Tokens that a chat's answer gets where the request does not say."""
    used = num_prompt_tokens + (document.num_tokens if document else 0)
    # At least 1: a prompt that leaves no room is refused by the engine, which says by how much.
    return max(1, min(service.settings.default_max_tokens, service.llm.max_model_len - used))


async def _answer(
    service: Service,
    request: Request,
    body: Generation,
    prompts: Sequence[Prompt],
    document: "Document | None",
    max_tokens: int,
    deadline: float,
    kind: type[Answer],
) -> Response | dict[str, Any]:
    try:
        params = body.sampling_params(max_tokens)
    except ValueError as error:
        raise as_api_error(error) from error
    answer = kind(model=body.model, num_choices=params.n, num_document_tokens=document.num_tokens if document else 0)
    outputs = newest_outputs(service, prompts, params, document, deadline)
    if not body.stream:
        return answer.whole(await while_connected(request.receive, last_outputs(outputs)))
    # The status is sent with the first token, so that a request that is refused or waits too long gets its own.
    first = await while_connected(request.receive, anext(outputs))
    return EventStream(answer.events(first, outputs, with_usage=body.wants_usage))
