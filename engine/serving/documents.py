"""The server's documents: read in the background, one after the other, kept in a folder if there is one."""

import asyncio
import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longshadow.engine.runtime import EngineClosed
from longshadow.engine.serving.errors import ApiError, as_api_error, stopping
from longshadow.engine.serving.pending import ID_PATTERN, PendingText, PendingTexts

if TYPE_CHECKING:
    from longshadow.engine.runtime import LLM, Document

SUFFIX = ".safetensors"
MOST_FAILED = 32

Status = Literal["waiting", "reading", "ready", "failed"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DocumentRecord:
    """One document as the server knows it.

    Args:
        num_read_tokens: of `num_tokens`, which is None until its text has been tokenised.
        read_seconds: what reading (or loading) it took.
        document: the engine's; None until it is ready.
        error: why it failed, or, of one that is ready, why it could not be saved.
        text: until it is read or deleted.
    """

    id: str
    name: str | None
    created: int
    status: Status = "waiting"
    num_read_tokens: int = 0
    num_tokens: int | None = None
    read_seconds: float | None = None
    document: "Document | None" = None
    is_saved: bool = False
    error: str | None = None
    is_deleted: bool = False
    text: str | None = None
    done: "Future[None]" = field(default_factory=Future)


class _Deleted(Exception):
    """Ends the reading of a document that nobody wants any more."""


class DocumentStore:
    """Documents by id.

    Args:
        folder: where they are saved; None: nowhere.
        max_waiting: documents that may wait to be read.
    """

    def __init__(self, llm: "LLM", *, folder: Path | None, max_waiting: int) -> None:
        self._llm = llm
        self._folder = folder
        self._pending = PendingTexts(folder)
        self._max_waiting = max_waiting
        self._records: dict[str, DocumentRecord] = {}
        self._lock = threading.Lock()
        # One at a time: the first document is ready soonest, and the engine's step budget is its own.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="longshadow-documents")

    def load_saved(self) -> None:
        """Makes the folder, loads what it holds, and goes on with texts that an earlier server did not get to read.

        A file that cannot be loaded is left alone and told of.

        Raises:
            OSError: the folder cannot be made or read.
        """
        if self._folder is None:
            return
        if not self._folder.exists():
            self._folder.mkdir(parents=True)
            logger.info("made the folder %s for documents", self._folder)
        for path in sorted(self._folder.glob(f"*{SUFFIX}"), key=_modified):
            if not ID_PATTERN.fullmatch(path.stem):
                logger.warning("%s was not saved by this server; left alone", path)
                continue
            started = time.monotonic()
            try:
                document = self._llm.load_document(path)
            except (ValueError, OSError) as error:
                logger.warning("%s cannot be loaded: %s", path, error)
                continue
            record = DocumentRecord(id=path.stem, name=document.name, created=int(_modified(path)), is_saved=True)
            self._finish(record, document, time.monotonic() - started)
            record.done.set_result(None)
            self._records[record.id] = record
        for pending in self._pending.found():
            if pending.id in self._records:  # saved, but the server ended before its text was removed
                self._forget_text(self._records[pending.id])
            else:
                logger.info("the document %s was not read to its end, and is read again", pending.id)
                self._start(self._record(pending))

    def add(self, text: str, *, name: str | None) -> DocumentRecord:
        """Takes a text in, to be read in the background. Where documents are saved, the text is on the disk on return.

        Raises:
            ApiError: it is surely too long, too many wait already, or it cannot be written.
        """
        try:
            self._llm.check_document(text)
        except ValueError as error:
            raise as_api_error(error) from error
        identity = f"doc-{secrets.token_hex(12)}"
        pending = PendingText(id=identity, name=name, created=int(time.time()), text=text)
        with self._lock:
            if sum(record.status == "waiting" for record in self._records.values()) >= self._max_waiting:
                message = f"{self._max_waiting} documents wait to be read, which is as many as may; try again later"
                raise ApiError(429, message, kind="rate_limit_error", code="too_many_documents")
            record = self._record(pending)
        try:
            self._pending.keep(pending)
            return self._start(record)
        except BaseException:
            self._records.pop(identity, None)
            raise

    def add_file(self, path: Path, text: str) -> DocumentRecord:
        """The same for a file given at the start; it is read once for all starts with one folder."""
        identity = f"doc-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:24]}"
        name = path.name.encode(errors="replace").decode()
        pending = PendingText(id=identity, name=name, created=int(time.time()), text=text)
        return self._records.get(identity) or self._start(self._record(pending))

    def records(self) -> list[DocumentRecord]:
        """All documents, in the order they came."""
        return list(self._records.values())

    def find(self, identity: str) -> DocumentRecord:
        """Raises `ApiError` when there is none of this id."""
        record = self._records.get(identity)
        if record is None:
            raise ApiError(404, f"there is no document {identity!r}", param="document", code="document_not_found")
        return record

    async def when_ready(self, identity: str, on_waiting: Callable[[], None]) -> "Document":
        """The engine's document, once it has been read; `on_waiting` is called if it is there, but was not read yet.

        Raises:
            ApiError: there is none, or it cannot be read.
        """
        record = self.find(identity)
        if not record.done.done():
            on_waiting()
        await asyncio.shield(asyncio.wrap_future(record.done))
        if record.is_deleted:
            self.find(identity)
        if record.document is None:
            if self._llm.is_closed:
                raise stopping()
            message = f"the document {identity!r} could not be read: {record.error}"
            raise ApiError(400, message, param="document", code="document_failed")
        return record.document

    def delete(self, identity: str) -> None:
        """Forgets a document and its file; requests that use it go on.

        Raises:
            ApiError: there is none.
            OSError: its file cannot be removed; the document stays.
        """
        record = self.find(identity)
        self._pending.forget(identity)
        if record.is_saved:
            self._path(record).unlink(missing_ok=True)
        with self._lock:
            record.is_deleted = True
            self._records.pop(identity, None)
            document, record.document, record.text = record.document, None, None
        if document is not None:
            self._llm.remove_document(document)
        if record.is_saved:  # since it was looked at
            self._path(record).unlink(missing_ok=True)

    def close(self) -> None:
        """Waits for what is being read, which the closed engine has ended; what waited fails."""
        self._reader.shutdown(wait=True)

    def _record(self, pending: PendingText) -> DocumentRecord:
        record = DocumentRecord(id=pending.id, name=pending.name, created=pending.created, text=pending.text)
        self._records[record.id] = record
        return record

    def _start(self, record: DocumentRecord) -> DocumentRecord:
        try:
            self._reader.submit(self._read, record)
        except RuntimeError as error:  # the store was closed
            raise stopping() from error
        if record.is_deleted:  # while it was written
            self._pending.forget(record.id)
        return record

    def _read(self, record: DocumentRecord) -> None:
        def progress(num_done: int, num_tokens: int) -> None:
            record.num_read_tokens, record.num_tokens = num_done, num_tokens
            if record.is_deleted:
                raise _Deleted

        started = time.monotonic()
        try:
            with self._lock:
                text, record.text = record.text, None
            if text is None:  # deleted
                return
            if self._llm.is_closed:
                raise EngineClosed("the engine was closed")
            record.status = "reading"
            document = self._llm.add_document(text, name=record.name, on_progress=progress)
            self._finish(record, document, time.monotonic() - started)
            if self._folder is not None and not record.is_deleted:
                self._save(record, document)
        except _Deleted:
            pass
        except Exception as error:
            self._fail(record, error)
        finally:
            record.done.set_result(None)

    def _finish(self, record: DocumentRecord, document: "Document", seconds: float) -> None:
        with self._lock:
            if not record.is_deleted:
                record.document, record.read_seconds = document, seconds
                record.num_read_tokens = record.num_tokens = document.num_tokens
                record.status = "ready"
                return
        self._llm.remove_document(document)

    def _fail(self, record: DocumentRecord, error: Exception) -> None:
        record.error = "the server is stopping" if isinstance(error, EngineClosed) else as_api_error(error).message
        record.status = "failed"
        failed = [one for one in self.records() if one.status == "failed"]
        for oldest in failed[:-MOST_FAILED]:
            self._records.pop(oldest.id, None)
            self._forget_text(oldest)
        # A text that is at fault itself would be again; others are tried again by the next server.
        if isinstance(error, ValueError):
            self._forget_text(record)

    def _save(self, record: DocumentRecord, document: "Document") -> None:
        path = self._path(record)
        try:
            document.save(path)
        except (ValueError, OSError) as error:
            record.error = f"not saved: {error}"
            logger.warning("the document %s is ready, but cannot be saved: %s", record.id, error)
            return
        with self._lock:
            record.is_saved = not record.is_deleted
        self._forget_text(record)
        if record.is_deleted:
            path.unlink(missing_ok=True)

    def _forget_text(self, record: DocumentRecord) -> None:
        try:
            self._pending.forget(record.id)
        except OSError as error:
            logger.warning("the text of the document %s cannot be removed: %s", record.id, error)

    def _path(self, record: DocumentRecord) -> Path:
        assert self._folder is not None
        return self._folder / f"{record.id}{SUFFIX}"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # a link to nowhere, or it has just gone: loading it tells
        return 0.0
