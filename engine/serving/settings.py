"""What a user chooses about the server; what the engine does is chosen when the engine is made."""

from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 2**20
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """Settings of one server.

    Args:
        model_name: what the model is called in requests and answers.
        host: address to listen on.
        port: 1 .. 65535, or 0 for a free one.
        api_key: asked for by everything but the page, `/health` and the description; None: no key.
        max_body_bytes: a longer request body is refused (413), at least 1,024.
        max_connections: clients connected at once, as far as the limit of open files allows, at least 1.
        patience_seconds: what a client gets to send a request's headers, to go on with its body, and to take what was
            sent to it, above 0.
        comment_seconds: a stream on which nothing comes for so long gets a comment, so that no proxy cuts it, above 0.
        request_seconds: a request, queueing included, that takes longer is ended (503), above 0.
        grace_seconds: what open requests get to finish when the server stops, at least 0; then they are failed.
        default_max_tokens: tokens of a chat answer at most, where the request does not say, at least 1; None: as many
            as fit into the context (and the memory, if as many chats as run at once get as much).
        max_waiting_documents: documents that may wait to be read (429 beyond), at least 1.
        documents_dir: folder where documents are saved, and loaded from at the start; None: they are not saved.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_body_bytes: int = 32 * MEBIBYTE
    max_connections: int = 1024
    patience_seconds: float = 30.0
    comment_seconds: float = 10.0
    request_seconds: float = 600.0
    grace_seconds: float = 30.0
    default_max_tokens: int | None = None
    max_waiting_documents: int = 16
    documents_dir: Path | None = None

    def __post_init__(self) -> None:
        if not self.model_name:
            raise ValueError("model_name must not be empty")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key must be one or more printable ASCII characters")
        if self.max_body_bytes < 1024:
            raise ValueError(f"max_body_bytes must be at least 1,024, got {self.max_body_bytes}")
        if self.max_connections < 1:
            raise ValueError(f"max_connections must be at least 1, got {self.max_connections}")
        for name in ("patience_seconds", "comment_seconds", "request_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.grace_seconds < float("inf"):
            raise ValueError(f"grace_seconds must be at least 0 and finite, got {self.grace_seconds}")
        if self.default_max_tokens is not None and self.default_max_tokens < 1:
            raise ValueError(f"default_max_tokens must be at least 1, got {self.default_max_tokens}")
        if self.max_waiting_documents < 1:
            raise ValueError(f"max_waiting_documents must be at least 1, got {self.max_waiting_documents}")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in LOOPBACK_NAMES or self.host.startswith("127.")
