"""OpenAI's answers, whole and in chunks, made of the engine's outputs."""

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from longshadow import __version__
from longshadow.engine.runtime import CompletionOutput, RequestOutput
from longshadow.engine.serving.connection import Event
from longshadow.engine.serving.errors import ApiError
from longshadow.engine.serving.logprobs import chat_logprobs, completion_logprobs

DONE = "[DONE]"
FINGERPRINT = f"longshadow-{__version__}"

Item = tuple[int, RequestOutput]


class Answer(ABC):
    """One answer to one request.

    Args:
        num_choices: completions of each prompt.

    Attributes:
        num_document_tokens: of the document that the prompts continue, once it has been read.
    """

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(self, *, model: str, num_choices: int) -> None:
        self._head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._num_choices = num_choices
        self.num_document_tokens = 0

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            self._choice(completion) | {"index": self._index(number, completion)}
            for number, output in enumerate(outputs)
            for completion in output.outputs
        ]
        return self._body(self.whole_object, choices, usage=self._usage(outputs))

    async def events(
        self, first: "asyncio.Future[Item]", rest: AsyncGenerator[Item, None], *, with_usage: bool
    ) -> AsyncGenerator[Event, None]:
        """The answer in chunks, of which the first may be to come; what fails on the way becomes the last event."""
        told: dict[int, CompletionOutput] = {}
        newest: dict[int, RequestOutput] = {}
        # With include_usage every chunk has the field, and only the last one a value.
        usage = {"usage": None} if with_usage else {}
        try:
            async with aclosing(rest):
                async for number, output in _chained(first, rest):
                    newest[number] = output
                    for completion in output.outputs:
                        index = self._index(number, completion)
                        before = told.get(index)
                        told[index] = completion
                        for choice in self._chunks(before, completion):
                            yield self._body(self.chunk_object, [choice | {"index": index}], **usage)
            if with_usage:
                yield self._body(self.chunk_object, [], usage=self._usage(newest.values()))
            yield DONE
        except ApiError as error:
            yield error.body()

    def _body(self, kind: str, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        return {**self._head, "object": kind, "system_fingerprint": FINGERPRINT, "choices": choices, **fields}

    def _index(self, number: int, completion: CompletionOutput) -> int:
        return number * self._num_choices + completion.index

    def _usage(self, outputs: Iterable[RequestOutput]) -> dict[str, Any]:
        prompt = completion = cached = 0
        for output in outputs:
            prompt += self.num_document_tokens + len(output.prompt_token_ids)
            completion += sum(len(one.token_ids) for one in output.outputs)
            cached += output.num_cached_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    @abstractmethod
    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        """A finished completion, without its index."""

    @abstractmethod
    def _chunks(self, before: CompletionOutput | None, now: CompletionOutput) -> Iterable[dict[str, Any]]:
        """What came since `before`, the completion as far as it has been told."""


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        return {
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": chat_logprobs(completion, 0),
            "finish_reason": completion.finish_reason,
        }

    def _chunks(self, before: CompletionOutput | None, now: CompletionOutput) -> Iterable[dict[str, Any]]:
        if before is None:
            yield {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        text, logprobs = _news(before, now), chat_logprobs(now, _num_told(before))
        if text or (logprobs and logprobs["content"]):
            yield {"delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}
        if _has_ended(before, now):
            yield {"delta": {}, "logprobs": None, "finish_reason": now.finish_reason}


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    whole_object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        return {
            "text": completion.text,
            "logprobs": completion_logprobs(completion, 0),
            "finish_reason": completion.finish_reason,
        }

    def _chunks(self, before: CompletionOutput | None, now: CompletionOutput) -> Iterable[dict[str, Any]]:
        text, logprobs = _news(before, now), completion_logprobs(now, _num_told(before))
        if text or (logprobs and logprobs["tokens"]) or _has_ended(before, now):
            yield {"text": text, "logprobs": logprobs, "finish_reason": now.finish_reason}


def _news(before: CompletionOutput | None, now: CompletionOutput) -> str:
    return now.text[len(before.text) :] if before else now.text


def _num_told(before: CompletionOutput | None) -> int:
    return len(before.logprobs) if before and before.logprobs else 0


def _has_ended(before: CompletionOutput | None, now: CompletionOutput) -> bool:
    return now.finish_reason is not None and (before is None or before.finish_reason is None)


async def _chained(first: "asyncio.Future[Item]", rest: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    yield await first
    async for item in rest:
        yield item
