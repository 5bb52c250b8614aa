"""Streams whose first token is not there yet: headers and comments come at once, and clients skip the comments."""

import asyncio
import itertools
import json
import time

import openai
import pytest

from longshadow.engine.runtime import QueueFull
from tests.engine.serving.conftest import serving
from tests.engine.serving.fake_engine import FakeEngine
from tests.engine.serving.test_bodies import CHAT, COMPLETION, refusal
from tests.engine.serving.test_failures import events_of

COMMENT = b": waiting\n\n"
OFTEN = {"comment_seconds": 0.05}


@pytest.fixture(scope="module")
def queued():
    """A server whose requests wait for a second."""
    with serving(FakeEngine(queue_seconds=1.0), **OFTEN) as server:
        yield server


@pytest.mark.parametrize("body", [CHAT, COMPLETION, COMPLETION | {"prompt": ["a", "b"]}], ids=["chat", "one", "two"])
def test_comments_come_while_a_request_is_queued(queued, body):
    path = "chat/completions" if "messages" in body else "completions"
    with queued.client() as client, client.stream("POST", f"/v1/{path}", json=body | {"stream": True}) as response:
        started = time.monotonic()
        assert response.status_code == 200
        pieces = response.iter_raw()
        first = next(pieces)
        assert first.startswith(COMMENT) and b"data" not in first
        assert time.monotonic() - started < 0.9, "not with the first token"
        rest = b"".join(pieces)
        assert rest.startswith(COMMENT) and rest.endswith(b"data: [DONE]\n\n")


def test_comments_come_while_a_document_is_read():
    with serving(FakeEngine(document_tempo=1.0), **OFTEN) as server, server.client() as client:
        identity = client.post("/v1/documents", json={"text": "some text"}).json()["id"]
        body = CHAT | {"document": identity, "stream": True, "stream_options": {"include_usage": True}}
        response = client.post("/v1/chat/completions", json=body)
        before, _, _ = response.text.partition("data:")
        assert before.count(": waiting\n\n") > 3
        *_, last, done = events_of(response)
        assert done == "[DONE]"
        assert json.loads(last)["usage"]["prompt_tokens"] == len("some text") + len("hello")


def test_comments_come_between_tokens():
    with serving(FakeEngine(tempo=0.5), **OFTEN) as server, server.client() as client:
        text = client.post("/v1/completions", json=COMPLETION | {"stream": True, "max_tokens": 2}).text
        _, first, second, _ = text.split("data:")
        assert ": waiting\n\n" in first and "[DONE]" not in second


def test_a_document_that_fails_is_told_by_an_event():
    engine = FakeEngine(document_tempo=0.5, document_failure=ValueError("no"))
    with serving(engine, **OFTEN) as server, server.client() as client:
        identity = client.post("/v1/documents", json={"text": "some text"}).json()["id"]
        body = COMPLETION | {"document": identity, "stream": True}
        [event] = events_of(client.post("/v1/completions", json=body))
        assert json.loads(event)["error"]["code"] == "document_failed"
        assert refusal(client.post("/v1/completions", json=body))["code"] == "document_failed", "it is known by now"


def test_a_prompt_of_several_that_is_refused_refuses_all():
    class Full(FakeEngine):
        async def stream(self, prompt, *arguments, **options):
            if prompt == "b":
                raise QueueFull("full")
            async for one in super().stream(prompt, *arguments, **options):
                yield one

    engine = Full(queue_seconds=0.2)
    with serving(engine) as server, server.client() as client:
        body = COMPLETION | {"prompt": ["a", "b"], "stream": True}
        assert refusal(client.post("/v1/completions", json=body), 429)["code"] == "queue_full"
        assert engine.num_open == 0


def test_the_openai_client_skips_comments(queued):
    client = queued.openai()
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "0 1 2"
    assert chunks[-1].usage.completion_tokens == 3
    with client.chat.completions.stream(**{**CHAT, "max_tokens": None, "max_completion_tokens": 3}) as stream:
        kinds = [event.type for event in itertools.islice(stream, 2)]
    assert kinds[0] == "chunk"


def test_the_asynchronous_openai_client_skips_comments(queued):
    async def texts():
        async with openai.AsyncOpenAI(base_url=f"{queued.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(**COMPLETION, stream=True)
            return [chunk.choices[0].text async for chunk in stream]

    assert "".join(asyncio.run(texts())) == "0 1 2"
