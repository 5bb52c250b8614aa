"""An engine without a model, whose speed and failures a test chooses: for what a real one does only by chance."""

import asyncio
import itertools
import threading
import time
from dataclasses import dataclass, field

from longshadow.engine.runtime import (
    CompletionOutput,
    EngineClosed,
    EngineStatistics,
    RequestMetrics,
    RequestOutput,
    RequestTooLong,
    SamplingParams,
)
from longshadow.engine.shadowkv import MemoryReport

DEVICE, HOST = {"factors": 400_000, "landmarks": 50_000}, {"values": 1_500_000}


@dataclass(eq=False)
class FakeDocument:
    name: str | None
    num_tokens: int
    full_cache_bytes: int = 3_000_000
    memory: MemoryReport = field(
        default_factory=lambda: MemoryReport(
            device={"factors": 400_000, "landmarks": 50_000}, host={"values": 1_500_000}
        )
    )

    def save(self, path):
        path.write_text(f"{self.name}\n{self.num_tokens}")


class FakeEngine:
    """Answers "0 1 2 ..." a word every `tempo` seconds, and counts what is open."""

    def __init__(
        self,
        *,
        tempo=0.0,
        failure=None,
        failure_after=0,
        document_tempo=0.0,
        document_failure=None,
        word="{}",
        queue_seconds=0.0,
    ):
        self.word, self.queue_seconds = word, queue_seconds
        self.tempo, self.failure, self.failure_after = tempo, failure, failure_after
        self.document_tempo, self.document_failure = document_tempo, document_failure
        self.max_model_len = 4096
        self.num_open = self.num_started = self.num_finished = self.num_readings = 0
        self.documents = []
        self._closed = threading.Event()

    async def stream(self, prompt, sampling_params=None, *, document=None, request_id=None, on_queued=None):
        self._check()
        if self.failure is not None and not self.failure_after:
            raise self.failure
        params = sampling_params or SamplingParams()
        max_tokens = params.max_tokens or self.max_model_len - len(prompt)
        arrival = time.monotonic()
        self.num_open += 1
        self.num_started += 1
        try:
            if on_queued is not None:
                on_queued()
            await asyncio.sleep(self.queue_seconds)
            for step in itertools.count(1):
                if self.failure is not None and step > self.failure_after:
                    raise self.failure
                is_last = step >= max_tokens
                yield output(prompt, [self.word.format(index) for index in range(step)], params.n, arrival, is_last)
                if is_last:
                    self.num_finished += 1
                    return
                await asyncio.sleep(self.tempo)
                self._check()
        finally:
            self.num_open -= 1

    def chat_prompt(self, messages, *, document=None):
        if messages[0]["role"] == "assistant":
            raise ValueError("the chat template refuses these messages (roles must alternate)")
        return [ord(letter) % 256 for message in messages for letter in message["content"]]

    def add_document(self, text, *, name=None, on_progress=None):
        self.num_readings += 1
        for step in range(11):
            self._check()
            if on_progress:
                on_progress(len(text) * step // 10, len(text))
            time.sleep(self.document_tempo / 10)
        if self.document_failure is not None:
            raise self.document_failure
        self.documents.append(FakeDocument(name, len(text)))
        return self.documents[-1]

    def check_document(self, text):
        if len(text) > 1_000_000:
            raise RequestTooLong("the document has at least 1,000,000 tokens")

    def load_document(self, path):
        name, num_tokens = path.read_text().split("\n")
        self.documents.append(FakeDocument(name, int(num_tokens)))
        return self.documents[-1]

    def remove_document(self, document):
        self.documents.remove(document)

    def statistics(self):
        numbers = dict.fromkeys(EngineStatistics.__dataclass_fields__, 0)
        return EngineStatistics(**{**numbers, "num_running": self.num_open, "device_limit_bytes": 10_000_000})

    def close(self):
        self._closed.set()

    @property
    def is_closed(self):
        return self._closed.is_set()

    @property
    def has_failed(self):
        return False

    def _check(self):
        if self.is_closed:
            raise EngineClosed("the engine was closed")


def output(prompt, words, n, arrival, is_last):
    now = time.monotonic()
    completions = [
        CompletionOutput(
            index=index,
            text=" ".join(words),
            token_ids=list(range(len(words))),
            logprobs=None,
            finish_reason="length" if is_last else None,
            stop_reason=None,
        )
        for index in range(n)
    ]
    return RequestOutput(
        request_id="",
        prompt_token_ids=list(prompt) if isinstance(prompt, list) else [ord(letter) for letter in prompt],
        outputs=completions,
        finished=is_last,
        num_cached_tokens=0,
        metrics=RequestMetrics(arrival=arrival, first_token=now, finished=now if is_last else None, queue_seconds=0.0),
    )
