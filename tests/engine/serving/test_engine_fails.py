"""A fault in the engine's loop, as clients and an operator see it."""

import logging

from longshadow.engine.runtime.llm import LLM
from tests.engine.serving.conftest import CHAT_TEMPLATE, PATIENCE, serving, wait_until
from tests.engine.serving.test_bodies import COMPLETION, refusal
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_one_fault_is_one_request_and_a_lasting_one_ends_the_server(caplog):
    llm = LLM(tiny_model(), tokenizer=tiny_tokenizer(CHAT_TEMPLATE), device_memory="200MB")
    decode, calls = llm._runner.decode, 0

    def faulty(states, tokens):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("simulated: a secret of the implementation")
        return decode(states, tokens)

    with serving(llm) as server, server.client() as client:
        llm._runner.decode = faulty
        error = refusal(client.post("/v1/completions", json=COMPLETION | {"max_tokens": 8}), 500)
        assert error["code"] == "internal_error" and "simulated" not in error["message"]
        assert any(record.exc_info and "simulated" in str(record.exc_info[1]) for record in caplog.records)
        assert client.post("/v1/completions", json=COMPLETION | {"max_tokens": 8}).status_code == 200
        assert client.get("/health").status_code == 200
        figures = client.get("/metrics").text
        assert "longshadow_engine_up 1.0" in figures and "longshadow_failed_requests 1.0" in figures

        llm._runner.decode = None  # from now on in every step
        events = client.post("/v1/completions", json=COMPLETION | {"max_tokens": 8, "stream": True}).text
        assert "internal_error" in events and "NoneType" not in events
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive() and llm.has_failed
        assert b"longshadow_engine_up 0.0" in server.service.metrics.page()
        assert [record.levelno for record in caplog.records].count(logging.CRITICAL) == 1


def test_health_tells_of_an_engine_that_has_ended(monkeypatch):
    llm = LLM(tiny_model(), tokenizer=tiny_tokenizer(CHAT_TEMPLATE), device_memory="200MB")
    with serving(llm) as server, server.client() as client:
        # As where the application runs in a server of somebody else's.
        monkeypatch.setattr(type(server.server), "on_tick", lambda self, counter: never(self))
        llm._runner.read = None
        refusal(client.post("/v1/completions", json=COMPLETION), 500)
        wait_until(lambda: llm.is_closed)
        assert refusal(client.get("/health"), 503)["message"] == "the engine has failed"
        assert "longshadow_engine_up 0.0" in client.get("/metrics").text


async def never(server):
    return server.should_exit
