"""Servers that run in a thread of the test, on a free port."""

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx2")
pytest.importorskip("openai")

from httpx2 import Client
from openai import OpenAI

from longshadow.engine.runtime.llm import LLM
from longshadow.engine.serving.application import make_service
from longshadow.engine.serving.server import bound_socket, make_server, url_of
from longshadow.engine.serving.service import Service
from longshadow.engine.serving.settings import ServingSettings
from tests.tiny_models import tiny_model, tiny_tokenizer

# How long a test waits for what happens at once on an idle machine.
PATIENCE = 120.0
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass
class RunningServer:
    """A server's address, and what it serves."""

    url: str
    service: Service
    server: object
    thread: threading.Thread

    def openai(self, api_key="none", **options):
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, **options)

    def client(self, **options):
        return Client(base_url=self.url, timeout=PATIENCE, trust_env=False, **options)

    def stop(self):
        """What SIGTERM does."""
        self.server.should_exit = True


@contextmanager
def serving(llm, *, keeps_engine=False, **settings):
    """Serves `llm` until the block is left; then closes it, unless others need it."""
    settings = ServingSettings(**{"model_name": "tiny", "port": 0, "grace_seconds": 5.0} | settings)
    service = make_service(llm, settings)
    service.documents.load_saved()
    bound = bound_socket(settings)
    url = url_of(bound)
    server = make_server(service)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield RunningServer(url, service, server, thread)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not stop"
        if not keeps_engine:
            llm.close()
        service.close()


@pytest.fixture(scope="session")
def llm():
    """An engine with the tiny model; shared, so leave it open and without documents."""
    with LLM(tiny_model(), tokenizer=tiny_tokenizer(CHAT_TEMPLATE), max_num_seqs=4, device_memory="200MB") as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm):
    """The tiny model, served."""
    with serving(llm, keeps_engine=True) as server:
        yield server


def wait_until(condition):
    """Waits for what another thread does; fails when it does not."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
