"""The application: every route, the gate before them, one shape for all errors."""

import time
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from starlette.responses import Response
from starlette.types import ASGIApp

from longshadow import __version__
from longshadow.engine.runtime import EngineClosed
from longshadow.engine.serving.completions import completion_routes
from longshadow.engine.serving.document_routes import document_routes
from longshadow.engine.serving.documents import DocumentStore
from longshadow.engine.serving.errors import as_api_error
from longshadow.engine.serving.gate import Gate
from longshadow.engine.serving.handlers import install_error_handlers
from longshadow.engine.serving.metrics import Metrics
from longshadow.engine.serving.page import page_routes
from longshadow.engine.serving.replies import Health, ModelCard, ModelList, refusals
from longshadow.engine.serving.service import Service
from longshadow.engine.serving.settings import ServingSettings

if TYPE_CHECKING:
    from longshadow.engine.runtime import LLM

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_service(llm: "LLM", settings: ServingSettings) -> Service:
    """An engine with what its routes share."""
    documents = DocumentStore(llm, folder=settings.documents_dir, max_waiting=settings.max_waiting_documents)
    return Service(llm=llm, settings=settings, documents=documents, metrics=Metrics(llm))


def make_application(service: Service) -> ASGIApp:
    """The ASGI application of a service."""
    # Its pages of documentation would load scripts from elsewhere.
    application = FastAPI(title="longshadow", version=__version__, docs_url=None, redoc_url=None)
    install_error_handlers(application)
    application.include_router(completion_routes(service))
    application.include_router(document_routes(service))
    application.include_router(model_routes(service))
    application.include_router(state_routes(service))
    application.include_router(page_routes())
    _describe(application)
    return Gate(application, service)


def model_routes(service: Service) -> APIRouter:
    """/v1/models, which has one."""
    router = APIRouter(prefix="/v1/models")
    name, created = service.settings.model_name, int(time.time())

    def card() -> ModelCard:
        return ModelCard(id=name, created=created, max_model_len=service.llm.max_model_len)

    @router.get("", responses=refusals(401, 503))
    async def list_models() -> ModelList:
        return ModelList(data=[card()])

    # Names of models hold slashes.
    @router.get("/{model:path}", responses=refusals(401, 404, 503))
    async def get_model(model: str) -> ModelCard:
        service.check_model(model)
        return card()

    return router


def state_routes(service: Service) -> APIRouter:
    """/health and /metrics."""
    router = APIRouter()

    @router.get("/health", responses=refusals(503))
    async def health() -> Health:
        if service.llm.is_closed:
            reason = "failed" if service.llm.has_failed else "ended"
            raise as_api_error(EngineClosed(f"the engine has {reason}"))
        return Health(status="ok")

    @router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **refusals(401, 503)})
    async def metrics() -> Response:
        return Response(service.metrics.page(), headers={"Content-Type": METRICS_TYPE})

    return router


def _describe(application: FastAPI) -> None:
    """Takes FastAPI's own shape of a body that is not valid out of the description: here that is a plain 400."""
    description = application.openapi()
    for operations in description["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        description["components"]["schemas"].pop(name, None)
