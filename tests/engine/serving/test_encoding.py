"""Tokenising long prompts: they wait for one another, nobody else waits for them, and those without a client go."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from longshadow.engine.serving import encoding
from tests.engine.serving.conftest import serving, wait_until
from tests.engine.serving.fake_engine import FakeEngine
from tests.engine.serving.test_bodies import CHAT, refusal

LONG = CHAT | {"messages": [{"role": "user", "content": "x" * encoding.LONG}]}


class SlowEngine(FakeEngine):
    """Encodes long messages when it may."""

    def __init__(self):
        super().__init__()
        self.may_encode, self.num_begun = threading.Event(), 0

    def chat_prompt(self, messages, *, document=None):
        if len(messages[0]["content"]) >= encoding.LONG:
            self.num_begun += 1
            assert self.may_encode.wait(60)
        return super().chat_prompt(messages[:1], document=document)[:3]


@pytest.fixture
def engine():
    return SlowEngine()


@pytest.fixture
def server(engine):
    with serving(engine) as server:
        yield server
        engine.may_encode.set()


def ask(server, body):
    with server.client() as client:
        return client.post("/v1/chat/completions", json=body)


def num_waiting(server):
    return server.service.encoding._long._num_open


def test_short_prompts_do_not_wait_for_long_ones(server, engine):
    with ThreadPoolExecutor(4) as threads:
        long = [threads.submit(ask, server, LONG) for _ in range(4)]
        wait_until(lambda: num_waiting(server) == 4)
        for _ in range(3):
            assert ask(server, CHAT).status_code == 200
        with server.client() as client:
            assert client.get("/health").status_code == 200
        assert engine.num_begun == 1, "one at a time"
        engine.may_encode.set()
        assert [answer.result().status_code for answer in long] == [200] * 4


def test_as_many_long_prompts_wait_as_may(server, engine):
    with ThreadPoolExecutor(encoding.MOST_LONG) as threads:
        long = [threads.submit(ask, server, LONG) for _ in range(encoding.MOST_LONG)]
        wait_until(lambda: num_waiting(server) == encoding.MOST_LONG)
        assert refusal(ask(server, LONG), 429)["code"] == "queue_full"
        engine.may_encode.set()
        assert {answer.result().status_code for answer in long} == {200}
    assert num_waiting(server) == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prompt_whose_client_left_is_not_tokenised(server, engine, stream):
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(ask, server, LONG)
        wait_until(lambda: engine.num_begun == 1)
        with server.client() as client, pytest.raises(Exception, match="timed out"):
            client.post("/v1/chat/completions", json=LONG | {"stream": stream}, timeout=0.5)
        wait_until(lambda: num_waiting(server) == 1)
        engine.may_encode.set()
        assert first.result().status_code == 200
    assert engine.num_begun == 1 and engine.num_started == 1


def test_time_in_the_queue_of_long_prompts_counts(engine):
    with serving(engine, request_seconds=0.3) as server:
        assert refusal(ask(server, LONG), 503)["code"] == "timeout"
        engine.may_encode.set()


def test_the_end_drops_what_waits(engine):
    with ThreadPoolExecutor(2) as threads, serving(engine, grace_seconds=0.2) as server:
        answers = [threads.submit(ask, server, LONG) for _ in range(2)]
        wait_until(lambda: num_waiting(server) == 2)
        server.stop()
        threading.Timer(1.0, engine.may_encode.set).start()
        assert {answer.result().status_code for answer in answers} == {503}
