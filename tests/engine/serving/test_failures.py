"""Requests that do not end as planned: clients that leave, engines that fail or are full, time that runs out."""

import json
import socket
import threading

import openai
import pytest

from longshadow.engine.runtime import EngineClosed, EngineDead, QueueFull, RequestFailed, RequestTooLong
from tests.engine.serving.conftest import serving, wait_until
from tests.engine.serving.fake_engine import FakeEngine
from tests.engine.serving.test_bodies import CHAT, COMPLETION, refusal

SLOW = 0.02
LONG = 10_000


def events_of(response):
    """The data of each event of a stream."""
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line and not line.startswith(":")]


@pytest.mark.parametrize("body", [CHAT, COMPLETION], ids=["chat", "completion"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_ends_its_request(body, stream):
    path = "chat/completions" if "messages" in body else "completions"
    engine = FakeEngine(tempo=SLOW)
    with serving(engine) as server:
        host, port = server.url.removeprefix("http://").split(":")
        content = json.dumps(body | {"max_tokens": LONG, "stream": stream, "n": 2})
        connection = socket.create_connection((host, int(port)))
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        wait_until(lambda: engine.num_open == 1)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()
        wait_until(lambda: engine.num_open == 0)
        assert engine.num_finished == 0
        with server.client() as client:
            text = client.get("/metrics").text
            assert "longshadow_cancelled_requests_total 1.0" in text


def test_several_prompts_end_together_when_the_client_leaves():
    engine = FakeEngine(tempo=SLOW)
    with serving(engine) as server:
        client = server.openai()
        stream = client.completions.create(model="tiny", prompt=["a", "b", "c"], max_tokens=LONG, stream=True)
        next(iter(stream))
        assert engine.num_started == 3
        stream.close()
        client.close()
        wait_until(lambda: engine.num_open == 0)


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (RequestTooLong("5,000 tokens are more than the 4,096 that this engine takes"), 400, "context_length_exceeded"),
        (ValueError("stop_token_ids must be below 257"), 400, None),
        (QueueFull("256 requests are waiting already"), 429, "queue_full"),
        (EngineClosed("the engine was closed"), 503, "engine_closed"),
        (EngineDead("the engine failed: a secret of the implementation"), 500, "internal_error"),
        (RequestFailed("a secret of the implementation"), 500, "internal_error"),
        (KeyError("a secret of the implementation"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_refusals_of_the_engine(failure, status, code, stream):
    with serving(FakeEngine(failure=failure)) as server, server.client() as client:
        response = client.post("/v1/completions", json=COMPLETION | {"stream": stream})
        error = refusal(response, status)
        assert error["code"] == code
        assert "secret" not in error["message"]
        assert ("retry-after" in response.headers) == (status in (429, 503))
        if isinstance(failure, ValueError) and code is None:
            assert error["param"] == "stop_token_ids"


def test_a_failure_in_mid_stream_is_the_last_event():
    with serving(FakeEngine(failure=KeyError("secret"), failure_after=2)) as server, server.client() as client:
        response = client.post("/v1/completions", json=COMPLETION | {"stream": True, "max_tokens": 9})
        assert response.status_code == 200
        *_, last = events_of(response)
        assert json.loads(last)["error"]["code"] == "internal_error"
        assert "secret" not in response.text and "[DONE]" not in response.text


def test_the_openai_client_raises_for_a_failure_in_mid_stream():
    with serving(FakeEngine(failure=EngineClosed("the engine failed"), failure_after=2, tempo=SLOW)) as server:
        stream = server.openai().chat.completions.create(**CHAT | {"max_tokens": 9}, stream=True)
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(stream)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_time_that_runs_out(stream):
    engine = FakeEngine(tempo=SLOW)
    with serving(engine, request_seconds=0.3) as server, server.client() as client:
        response = client.post("/v1/completions", json=COMPLETION | {"stream": stream, "max_tokens": LONG})
        error = json.loads(events_of(response)[-1])["error"] if stream else refusal(response, 503)
        assert error["code"] == "timeout"
        assert "0.3 seconds" in error["message"]
        wait_until(lambda: engine.num_open == 0)


def test_time_in_the_queue_counts():
    with serving(FakeEngine(document_tempo=5.0), request_seconds=0.3) as server, server.client() as client:
        identity = client.post("/v1/documents", json={"text": "some text"}).json()["id"]
        response = client.post("/v1/completions", json=COMPLETION | {"document": identity})
        assert refusal(response, 503)["code"] == "timeout"
        response = client.post("/v1/completions", json=COMPLETION | {"document": identity, "stream": True})
        assert response.status_code == 200
        assert [json.loads(event)["error"]["code"] for event in events_of(response)] == ["timeout"]
        client.delete(f"/v1/documents/{identity}")


def test_the_end_waits_for_what_is_open():
    engine = FakeEngine(tempo=SLOW)
    with serving(engine) as server:
        stream = server.openai().completions.create(model="tiny", prompt="a", max_tokens=30, stream=True)
        next(iter(stream))
        server.stop()
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert engine.num_finished == 1


def test_the_end_fails_what_does_not_finish():
    engine = FakeEngine(tempo=SLOW)
    answers = {}
    with serving(engine, grace_seconds=0.2) as server, server.client() as client:

        def whole():
            answers["whole"] = client.post("/v1/completions", json=COMPLETION | {"max_tokens": LONG})

        thread = threading.Thread(target=whole)
        thread.start()
        stream = server.openai().completions.create(model="tiny", prompt="a", max_tokens=LONG, stream=True)
        next(iter(stream))
        wait_until(lambda: engine.num_open == 2)
        server.stop()
        with pytest.raises(openai.APIError, match="closed"):
            list(stream)
        thread.join()
        assert refusal(answers["whole"], 503)["code"] == "engine_closed"
        server.thread.join(30)
        assert not server.thread.is_alive()
    assert engine.num_open == 0


def test_the_end_fails_what_waits_for_a_document():
    answers = []
    with serving(FakeEngine(document_tempo=10.0), grace_seconds=0.2) as server, server.client() as client:
        identity = client.post("/v1/documents", json={"text": "some text"}).json()["id"]
        ask = COMPLETION | {"document": identity}
        thread = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=ask)))
        thread.start()
        wait_until(lambda: server.server.server_state.tasks)
        server.stop()
        thread.join()
        assert refusal(answers[0], 503)["code"] == "shutting_down"


def test_no_request_is_taken_at_the_end():
    with serving(FakeEngine()) as server, server.client() as client:
        assert client.get("/health").status_code == 200
        server.service.is_stopping = True
        assert refusal(client.get("/health"), 503)["code"] == "shutting_down"
        assert refusal(client.post("/v1/completions", json=COMPLETION), 503)["code"] == "shutting_down"


def test_health_tells_of_a_closed_engine():
    engine = FakeEngine()
    with serving(engine) as server, server.client() as client:
        engine.close()
        assert refusal(client.get("/health"), 503)["code"] == "engine_closed"


def test_a_reader_that_is_slow_gets_the_newest_output():
    engine = FakeEngine(tempo=0.0)
    with serving(engine) as server, server.client() as client:
        response = client.post("/v1/completions", json=COMPLETION | {"stream": True, "max_tokens": 500})
        *chunks, done = events_of(response)
        assert done == "[DONE]"
        text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
        assert text == " ".join(map(str, range(500)))
