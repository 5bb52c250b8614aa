"""From a request's prompts to the engine's outputs, within the time that the request has."""

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from longshadow.engine.runtime import RequestOutput, SamplingParams
from longshadow.engine.serving.connection import cancelled
from longshadow.engine.serving.errors import ApiError, as_api_error, too_slow
from longshadow.engine.serving.service import Service

if TYPE_CHECKING:
    from longshadow.engine.runtime import Document

Prompt = str | list[int]


async def newest_outputs(
    service: Service,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    document: "Document | None",
    deadline: float,
    on_waiting: Callable[[], None],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs with the number of their prompt as they come; closing the generator cancels what still runs.

    An output holds everything before it, so a reader that is slow is given the newest one only.

    Args:
        deadline: a moment of the event loop's clock.
        on_waiting: called when the engine has taken all prompts, and they wait for their turns.

    Raises:
        ApiError: a prompt was refused, the time is over, or the engine has ended.
    """
    newest: dict[int, RequestOutput] = {}
    news = asyncio.Event()
    num_queued = 0

    def queued() -> None:
        nonlocal num_queued
        num_queued += 1
        if num_queued == len(prompts):
            on_waiting()

    async def follow(index: int, prompt: Prompt) -> None:
        output = None
        try:
            stream = functools.partial(service.llm.stream, prompt, params, document=document, on_queued=queued)
            outputs = await service.encoding.run(len(prompt), stream)
            async with aclosing(outputs):
                async for output in outputs:
                    newest[index] = output
                    news.set()
        finally:
            news.set()
            service.metrics.count(output)

    tasks = [asyncio.create_task(follow(index, prompt)) for index, prompt in enumerate(prompts)]
    try:
        while True:
            async with asyncio.timeout_at(deadline):
                await news.wait()
            news.clear()
            are_done = [task.done() for task in tasks]
            for task in tasks:
                if task.done():
                    task.result()
            while newest:
                yield _checked(newest.popitem())
            if all(are_done):
                return
    except TimeoutError as error:
        raise too_slow(service.settings.request_seconds) from error
    except Exception as error:
        raise as_api_error(error) from error
    finally:
        await cancelled(*tasks)


async def last_outputs(outputs: AsyncGenerator[tuple[int, RequestOutput], None]) -> list[RequestOutput]:
    """The finished output of each prompt, in their order."""
    last = {}
    async with aclosing(outputs):
        async for index, output in outputs:
            last[index] = output
    return [last[index] for index in sorted(last)]


def _checked(item: tuple[int, RequestOutput]) -> tuple[int, RequestOutput]:
    if any(completion.finish_reason == "cancelled" for completion in item[1].outputs):
        raise ApiError(503, "the request was cancelled", kind="service_unavailable_error", code="cancelled")
    return item
