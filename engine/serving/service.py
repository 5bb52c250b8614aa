"""What the routes of one server share."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from longshadow.engine.serving.documents import DocumentStore
from longshadow.engine.serving.encoding import Encoding
from longshadow.engine.serving.errors import ApiError
from longshadow.engine.serving.metrics import Metrics
from longshadow.engine.serving.settings import ServingSettings

if TYPE_CHECKING:
    from longshadow.engine.runtime import LLM


@dataclass(kw_only=True)
class Service:
    """An engine that is being served.

    Args:
        is_stopping: no further request is taken.
    """

    llm: "LLM"
    settings: ServingSettings
    documents: DocumentStore
    metrics: Metrics
    encoding: Encoding = field(default_factory=Encoding)
    is_stopping: bool = False

    def check_model(self, name: str) -> None:
        """Raises `ApiError` for a model that is not the one served."""
        if name != self.settings.model_name:
            message = f"the model {name!r} does not exist; this server has {self.settings.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def close(self) -> None:
        """Ends the threads of a closed engine's service."""
        self.documents.close()
        self.encoding.close()
