"""/v1/documents: long texts that are read once and named by any number of requests."""

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from longshadow.engine.serving.bodies import DocumentBody
from longshadow.engine.serving.documents import DocumentRecord, Status
from longshadow.engine.serving.replies import refusals
from longshadow.engine.serving.service import Service


class DocumentMemory(BaseModel):
    """What a document takes, by part and place, beside a full cache of the same tokens; all in bytes."""

    device: dict[str, int]
    host: dict[str, int]
    device_bytes: int
    host_bytes: int
    full_cache_bytes: int


class DocumentReply(BaseModel):
    """A document as it is now."""

    id: str
    object: Literal["document"] = "document"
    created: int
    name: str | None
    status: Status
    num_read_tokens: int
    num_tokens: int | None = Field(description="Null until the text has been tokenised.")
    read_seconds: float | None
    memory: DocumentMemory | None
    saved: bool
    error: str | None = Field(description="Why it failed; of a document that is ready, why it was not saved.")


class DocumentList(BaseModel):
    """All documents, in the order they came."""

    object: Literal["list"] = "list"
    data: list[DocumentReply]


class DocumentDeleted(BaseModel):
    """A document is gone; requests that use it go on."""

    id: str
    object: Literal["document.deleted"] = "document.deleted"
    deleted: Literal[True] = True


def document_routes(service: Service) -> APIRouter:
    """The routes of documents."""
    router = APIRouter(prefix="/v1/documents")
    store = service.documents

    @router.post("", status_code=201, responses=refusals(400, 401, 413, 429, 500, 503, 507))
    async def create_document(body: DocumentBody) -> DocumentReply:
        return reply(await asyncio.to_thread(store.add, body.text, name=body.name))

    @router.get("", responses=refusals(401, 503))
    async def list_documents() -> DocumentList:
        return DocumentList(data=[reply(record) for record in store.records()])

    @router.get("/{document_id}", responses=refusals(401, 404, 503))
    async def get_document(document_id: str) -> DocumentReply:
        return reply(store.find(document_id))

    @router.delete("/{document_id}", responses=refusals(401, 404, 500, 503))
    async def delete_document(document_id: str) -> DocumentDeleted:
        await asyncio.to_thread(store.delete, document_id)
        return DocumentDeleted(id=document_id)

    return router


def reply(record: DocumentRecord) -> DocumentReply:
    """A record as clients see it."""
    document = record.document
    memory = None
    if document is not None:
        held = document.memory
        memory = DocumentMemory(
            device=held.device,
            host=held.host,
            device_bytes=held.device_bytes,
            host_bytes=held.host_bytes,
            full_cache_bytes=document.full_cache_bytes,
        )
    return DocumentReply(
        id=record.id,
        created=record.created,
        name=record.name,
        status=record.status,
        num_read_tokens=record.num_read_tokens,
        num_tokens=record.num_tokens,
        read_seconds=record.read_seconds,
        memory=memory,
        saved=record.is_saved,
        error=record.error,
    )
