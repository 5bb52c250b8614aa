"""/v1/chat/completions and /v1/completions."""

import asyncio
import dataclasses
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from longshadow.engine.serving.answers import Answer, ChatAnswer, CompletionAnswer, Item
from longshadow.engine.serving.bodies import ChatCompletionBody, CompletionBody, Generation
from longshadow.engine.serving.connection import EventStream, cancelled, while_connected
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
        turns = [message.as_turn() for message in body.messages]
        size = sum(len(turn["content"]) for turn in turns)

        async def prompts(document: "Document | None") -> list[Prompt]:
            encode = functools.partial(service.llm.chat_prompt, turns, document=document)
            return [await service.encoding.run(size, encode)]

        asked = _Asked(service, body, prompts, body.chosen_max_tokens(), ChatAnswer)
        return await asked.answered(request)

    @router.post("/v1/completions", response_model=Completion, responses=RESPONSES)
    async def completions(body: CompletionBody, request: Request) -> Any:
        async def prompts(document: "Document | None") -> list[Prompt]:
            return list(body.prompts())

        return await _Asked(service, body, prompts, body.max_tokens or DEFAULT_MAX_TOKENS, CompletionAnswer).answered(
            request
        )

    return router


class _Asked:
    """A request that generates, from its body to its answer.

    Args:
        prompts: makes its prompts, once the document that it names has been read.
        max_tokens: of each completion; None: the server's default, or what is left.
    """

    def __init__(
        self,
        service: Service,
        body: Generation,
        prompts: "Callable[[Document | None], Awaitable[list[Prompt]]]",
        max_tokens: int | None,
        kind: type[Answer],
    ) -> None:
        service.check_model(body.model)
        try:
            self._params = body.sampling_params(max_tokens)
        except ValueError as error:
            raise as_api_error(error) from error
        self._service = service
        self._body = body
        self._prompts = prompts
        self._answer = kind(model=body.model, num_choices=self._params.n)
        self._deadline = asyncio.get_running_loop().time() + service.settings.request_seconds

    async def answered(self, request: Request) -> Response | dict[str, Any]:
        """The answer, or a stream of it; a stream begins when nothing is left to do but to wait."""
        waiting = asyncio.Event()
        outputs = self._outputs(waiting.set)
        if not self._body.stream:
            return self._answer.whole(await while_connected(request.receive, last_outputs(outputs)))
        first = asyncio.ensure_future(anext(outputs))
        try:
            await while_connected(request.receive, _either(first, waiting))
        except BaseException:
            await cancelled(first)
            raise
        # What went wrong until here has a status of its own; later it is told by an event.
        if first.done():
            first.result()
        events = self._answer.events(first, outputs, with_usage=self._body.wants_usage)
        return EventStream(events, comment_seconds=self._service.settings.comment_seconds)

    async def _outputs(self, on_waiting: Callable[[], None]) -> AsyncGenerator[Item, None]:
        """Every newest output, after the document has been read and the messages were encoded.

        Raises:
            ApiError: anything went wrong, or the time is over.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                document, prompts = await self._beginning(on_waiting)
            params = self._params
            most = self._service.settings.default_max_tokens
            if params.max_tokens is None and most is not None:
                # At least 1: a prompt that leaves no room is refused by the engine, which says by how much.
                room = max(1, self._service.llm.max_model_len - self._answer.num_document_tokens - len(prompts[0]))
                params = dataclasses.replace(params, max_tokens=min(most, room))
        except TimeoutError as error:
            raise too_slow(self._service.settings.request_seconds) from error
        except Exception as error:
            raise as_api_error(error) from error
        outputs = newest_outputs(self._service, prompts, params, document, self._deadline, on_waiting)
        async with aclosing(outputs):
            async for item in outputs:
                yield item

    async def _beginning(self, on_waiting: Callable[[], None]) -> "tuple[Document | None, list[Prompt]]":
        document = None
        if self._body.document is not None:
            document = await self._service.documents.when_ready(self._body.document, on_waiting)
            self._answer.num_document_tokens = document.num_tokens
        return document, await self._prompts(document)


async def _either(first: "asyncio.Future[Item]", waiting: asyncio.Event) -> None:
    """Waits for a first output, or until it is only waited for."""
    wait = asyncio.ensure_future(waiting.wait())
    try:
        await asyncio.wait((first, wait), return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancelled(wait)
