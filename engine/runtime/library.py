"""Documents of an engine: read from tokens, or restored from files."""

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longshadow.engine.runtime.accounting import Accounting, Need
from longshadow.engine.runtime.document_file import read_document, write_document
from longshadow.engine.runtime.document_header import Header
from longshadow.engine.runtime.documents import Document
from longshadow.engine.runtime.engine import Engine
from longshadow.engine.runtime.errors import DocumentError, RequestTooLong
from longshadow.engine.runtime.identity import model_fingerprint, requirements
from longshadow.engine.runtime.memory import Bytes
from longshadow.engine.runtime.requests import Reading
from longshadow.engine.runtime.restoring import restore_state
from longshadow.engine.runtime.runner import ModelRunner
from longshadow.engine.runtime.state import SequenceState
from longshadow.engine.runtime.waiting import wait_for_document


class Library:
    """Makes documents, which the engine then holds."""

    def __init__(self, engine: Engine, runner: ModelRunner, accounting: Accounting, max_model_len: int) -> None:
        self._engine, self._runner, self._accounting = engine, runner, accounting
        # A question and an answer have a token each, at least.
        self._max_tokens = max_model_len - 2
        self._fingerprint: str | None = None

    def read(self, tokens: list[int], name: str | None, on_progress: Callable[[int, int], None] | None) -> Document:
        """A document of these tokens; blocks until it is there. Raises RequestTooLong, QueueFull, EngineClosed."""
        if len(tokens) > self._max_tokens:
            raise RequestTooLong(
                f"the document has {len(tokens):,} tokens; with a question and an answer {self._max_tokens + 2:,} fit"
            )
        arrived: queue.SimpleQueue[tuple[int, int] | Document | Exception] = queue.SimpleQueue()
        need = self._accounting.need(len(tokens), 0)
        job = Reading(
            num_prompt=len(tokens),
            num_slots=0,
            need=Need(prefill=need.prefill, shared=need.shared + need.completion, completion=Bytes()),
            tokens=tokens,
            build=lambda state, reserved: self._document(state, reserved, name),
            sink=arrived.put,
        )
        self._engine.submit(job)
        try:
            return wait_for_document(arrived, len(tokens), on_progress)
        except BaseException:
            self._engine.cancel_reading(job)
            raise

    def load(self, place: Path) -> Document:
        """The document of a file, with its id and name. Raises DocumentError."""
        reserved: list[Bytes] = []

        def reserve(header: Header) -> None:
            total = self._accounting.document(header.start)
            self._engine.reserve(total)
            reserved.append(total)

        try:
            header, tensors = read_document(
                place, self._requirements(), self._accounting, self._runner.model.dtype, self._max_tokens, reserve
            )
            document = self._document(restore_state(self._runner, header, tensors), reserved[0], header.name)
            document.id = header.id
            self._engine.hold(document)
        except BaseException as error:
            for amount in reserved:
                self._engine.release(amount)
            if isinstance(error, RequestTooLong):
                raise DocumentError(f"cannot load {place}: {error}") from error
            raise
        return document

    def _document(self, state: SequenceState, reserved: Bytes, name: str | None) -> Document:
        return Document(
            name=name,
            num_tokens=state.num_tokens,
            memory=state.memory(values_on_host=self._runner.config.value_store == "host"),
            full_cache_bytes=sum(shape.exact_bytes(state.num_tokens) for shape in self._runner.shapes),
            state=state,
            reserved=reserved,
            writer=lambda document, path: write_document(document, path, self._requirements()),
        )

    def _requirements(self) -> dict[str, Any]:
        """What an engine that loads a document must share with this one."""
        model = self._runner.model
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(model)
        return requirements(model, self._runner.shapes, self._runner.config, self._fingerprint)
